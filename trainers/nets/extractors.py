"""Networks that only judge: Inception features, CLIP, dlib's landmarks and face parsers, from files that the user has.

Each takes images (B, 3, H, W) float32 in [-1, 1]. They see what is stored, which is 8 bits a channel: images are
rounded to that first. Resizing belongs to an extractor, because the values change with it.
"""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from datamodules.errors import UserError

INCEPTION_FILE = "inception-2015-12-05.pt"


class InceptionFeatures(nn.Module):
    """Inception's 2,048 pooled features as clean-fid computes them: the standard for FID and KID here.

    Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022: each channel resized
    to 299 pixels by Pillow's bicubic filter in floating point, without rounding; then (x - 128) / 128. Both the resizer
    and the network are clean-fid's own.

    Args:
        network: clean-fid's wrapper of the TorchScript network: (B, 3, 299, 299) in [0, 255] -> (B, 2048).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        from cleanfid.resize import build_resizer

        self.network = network
        self.resize = build_resizer("clean")

    @classmethod
    def from_file(cls, path: Path) -> nn.Module:
        """The TorchScript file that clean-fid and StyleGAN2-ADA use.

        Raises:
            UserError: a file of another name, or not TorchScript.
        """
        from cleanfid.inception_torchscript import InceptionV3W

        if path.name != INCEPTION_FILE:
            raise UserError(
                f"{path}: expected the TorchScript network {INCEPTION_FILE}; features of others do not compare"
            )
        try:
            return cls(InceptionV3W(str(path.parent), download=False))
        except RuntimeError as error:
            raise UserError(f"{path}: not a TorchScript network; download it again") from error

    @classmethod
    def from_hub(cls, name: str) -> nn.Module:
        """``inception-torchmetrics`` or ``inception-torch-fidelity``; see :class:`FidelityFeatures`.

        Raises:
            UserError: another name, or the package torch-fidelity or its weights are missing.
        """
        variants = {"inception-torchmetrics": True, "inception-torch-fidelity": False}
        if name not in variants:
            raise UserError(
                f"backbone 'hub:{name}': unknown feature extractor; expected path:.../{INCEPTION_FILE}, "
                f"{' or '.join(f'hub:{variant}' for variant in variants)}, or weights as demo:attributes-judge"
            )
        return FidelityFeatures(name, antialias=variants[name])

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2048) float32."""
        resized = np.stack([self.resize(pixels) for pixels in to_bytes(image).permute(0, 2, 3, 1).cpu().numpy()])
        return self.network(torch.from_numpy(resized).permute(0, 3, 1, 2).to(image.device))


class FidelityFeatures(nn.Module):
    """Inception's 2,048 features as torchmetrics or torch-fidelity compute them, by torchmetrics' own wrapper.

    Both use torch-fidelity's weights, and resize inside the network: torchmetrics bilinearly with antialiasing (since
    1.8), torch-fidelity as TensorFlow 1 did. The values compare with neither each other's nor clean-fid's.

    Args:
        name: of the variant, for messages.
        antialias: whether to resize with antialiasing.

    Raises:
        UserError: torch-fidelity is not installed, or its weights can neither be found nor downloaded.
    """

    def __init__(self, name: str, antialias: bool) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=antialias)
        except ModuleNotFoundError as error:
            raise UserError(
                f"backbone 'hub:{name}': needs the package torch-fidelity; pip install torch-fidelity"
            ) from error
        except (URLError, OSError) as error:
            raise UserError(
                f"backbone 'hub:{name}': torch-fidelity's Inception weights are not in "
                f"{torch.hub.get_dir()}/checkpoints and cannot be downloaded; copy them there"
            ) from error

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2048) float32."""
        return self.network(to_bytes(image)).reshape(len(image), -1)


class CLIPEncoder(nn.Module):
    """CLIP's image and text embeddings, with the model's own resizing and tokeniser (transformers).

    Args:
        model: the networks.
        processor: resizes images, splits texts; texts are cut to what the model takes.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor) -> None:
        super().__init__()
        self.model = model
        self.processor = processor

    @classmethod
    def from_config(cls, config: dict[str, Any], vocabulary: dict[str, int], merges: list[str]) -> "CLIPEncoder":
        """A network with random weights, to be trained or filled; pixels reach it in [-1, 1].

        Args:
            config: arguments of transformers' ``CLIPConfig``.
            vocabulary: token -> number.
            merges: of the byte pairs, most frequent first, each two tokens with a space between.
        """
        model = CLIPModel(CLIPConfig(**config))
        sizes: Any = model.config
        side, length = sizes.vision_config.image_size, sizes.text_config.max_position_embeddings
        settings: Any = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        images = CLIPImageProcessor(**settings, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        pairs: Any = [tuple(merge.split(" ")) for merge in merges]
        return cls(model, CLIPProcessor(images, CLIPTokenizer(vocabulary, pairs, model_max_length=length)))

    @classmethod
    def from_hub(cls, name: str) -> nn.Module:
        """A model of the Hugging Face hub from the local cache, for instance ``openai/clip-vit-base-patch32``.

        Raises:
            UserError: it is not in the cache, or not a CLIP model.
        """
        return cls._pretrained(name, f"hub:{name}")

    @classmethod
    def from_file(cls, path: Path) -> nn.Module:
        """A folder as written by ``save_pretrained``; ``path`` is its ``model.safetensors``.

        Raises:
            UserError: the folder lacks something, or is not a CLIP model.
        """
        return cls._pretrained(str(path.parent), f"path:{path.parent}")

    @classmethod
    def _pretrained(cls, name: str, spec: str) -> nn.Module:
        try:
            loaded: Any = CLIPModel.from_pretrained(
                name, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            model, report = loaded
            processor = CLIPProcessor.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"backbone '{spec}': no CLIP model there or in the local cache ({type(error).__name__}); run "
                "'hf download openai/clip-vit-base-patch32' where there is a network, or give a folder as path:<folder>"
            ) from error
        if report["missing_keys"]:
            raise UserError(f"backbone '{spec}': not a complete CLIP model, lacks {min(report['missing_keys'])}")
        return cls(model, processor)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D) float32 embeddings, not normalised."""
        inputs = self.processor(images=list(to_bytes(image)), return_tensors="pt")
        return self.model.get_image_features(pixel_values=inputs["pixel_values"].to(image.device)).pooler_output

    def encode_text(self, captions: list[str]) -> Tensor:
        """B captions -> (B, D) float32 embeddings, not normalised."""
        inputs = self.processor(text=captions, return_tensors="pt", padding=True, truncation=True)
        return self.model.get_text_features(**inputs.to(self.model.device)).pooler_output


class FaceParser(nn.Module):
    """Which part of the face each pixel shows, by a SegFormer (transformers).

    Args:
        model: the network; its configuration names the parts.
        processor: resizes and normalises images.

    Attributes:
        parts: names of the classes.
    """

    def __init__(self, model: SegformerForSemanticSegmentation, processor: SegformerImageProcessor) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        names: dict[int, str] = model.config.id2label  # type: ignore[assignment]
        self.parts = [names[i] for i in range(len(names))]

    @classmethod
    def from_hub(cls, name: str) -> nn.Module:
        """A model of the Hugging Face hub from the local cache, for instance ``jonathandinu/face-parsing``.

        Raises:
            UserError: it is not in the cache, or no SegFormer.
        """
        return cls._pretrained(name, f"hub:{name}")

    @classmethod
    def from_file(cls, path: Path) -> nn.Module:
        """A folder as written by ``save_pretrained``; ``path`` is its ``model.safetensors``.

        Raises:
            UserError: the folder lacks something, or is no SegFormer.
        """
        return cls._pretrained(str(path.parent), f"path:{path.parent}")

    @classmethod
    def _pretrained(cls, name: str, spec: str) -> nn.Module:
        try:
            loaded: Any = SegformerForSemanticSegmentation.from_pretrained(
                name, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            model, report = loaded
            processor = SegformerImageProcessor.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"backbone '{spec}': no SegFormer there or in the local cache ({type(error).__name__}); run "
                "'hf download jonathandinu/face-parsing' where there is a network, or give a folder as path:<folder>"
            ) from error
        if report["missing_keys"]:
            raise UserError(f"backbone '{spec}': not a complete SegFormer, lacks {min(report['missing_keys'])}")
        return cls(model, processor)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, H, W) int64 numbers in ``parts``, at the image's own size."""
        inputs = self.processor(images=list(to_bytes(image)), return_tensors="pt")
        logits = self.model(pixel_values=inputs["pixel_values"].to(image.device)).logits
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False).argmax(1)


class DlibLandmarks(nn.Module):
    """dlib's 68 landmarks, from the optional packages of the extra ``dlib``.

    Args:
        path: ``shape_predictor_68_face_landmarks.dat``; by default the one of face-recognition-models.

    Raises:
        UserError: the optional packages are not installed, or the file is not dlib's.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        try:
            import dlib
        except ImportError as error:
            raise UserError("landmarks: dlib is missing; pip install 'facebench[dlib]'") from error
        if path is None:
            try:
                import face_recognition_models
            except ImportError as error:
                raise UserError(
                    "landmarks: face-recognition-models is missing; pip install 'facebench[dlib]'"
                ) from error
            path = Path(face_recognition_models.__path__[0]) / "models" / "shape_predictor_68_face_landmarks.dat"
        self._detect = dlib.get_frontal_face_detector()
        try:
            self._place = dlib.shape_predictor(str(path))
        except RuntimeError as error:
            raise UserError(f"{path}: not a dlib shape predictor; download it again") from error

    @classmethod
    def from_hub(cls, name: str) -> nn.Module:
        """``dlib-68``.

        Raises:
            UserError: another name, or the extra is not installed.
        """
        if name != "dlib-68":
            raise UserError(f"backbone 'hub:{name}': expected hub:dlib-68, or the predictor's file as path:<file>")
        return cls()

    @classmethod
    def from_file(cls, path: Path) -> nn.Module:
        """A file of dlib's shape predictor for 68 points."""
        return cls(path)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 68, 2) float32, x and y in pixels; NaN where no face is found."""
        pixels = to_bytes(image).permute(0, 2, 3, 1).cpu().numpy()
        return torch.stack([self._points(np.ascontiguousarray(face)) for face in pixels]).to(image.device)

    def _points(self, pixels: np.ndarray) -> Tensor:
        boxes = self._detect(pixels, 1)
        if not boxes:
            return torch.full((68, 2), torch.nan)
        shape = self._place(pixels, max(boxes, key=lambda box: box.area()))
        return torch.tensor([[point.x, point.y] for point in shape.parts()], dtype=torch.float32)


def to_bytes(image: Tensor) -> Tensor:
    """Images in [-1, 1] as they are stored: uint8 in 0 ... 255."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
