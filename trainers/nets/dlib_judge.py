"""An identity judge that shares nothing with what is trained here: dlib's 128-d face descriptor.

Needs the extra ``dlib`` (``dlib-bin`` and ``face-recognition-models``). It is trained on photographs of real
people, so it judges images of any generator; it is slow (about 0.3 s a face) and has no gradient.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import UserError

# dlib looks for faces of at least 80 pixels and cuts 150-pixel chips: smaller images are enlarged first.
WORKING_SIZE = 256
# Where the face of an aligned portrait lies, as shares of the side, when the detector does not find it.
FALLBACK_BOX = (0.2, 0.25, 0.8, 0.85)


class DlibIdentity(nn.Module):
    """dlib's detector, 5-point alignment and ResNet descriptor, behind the interface of an identity encoder.

    dlib compares descriptors by Euclidean distance; here they are normalised, so that their cosine compares.

    Raises:
        UserError: the optional packages are not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            import dlib
        except ImportError as error:
            raise UserError("backbone 'hub:dlib': dlib is missing; pip install 'facebench[dlib]'") from error
        models = find_spec("face_recognition_models")
        if models is None or models.origin is None:
            raise UserError("backbone 'hub:dlib': face-recognition-models is missing; pip install 'facebench[dlib]'")
        folder = Path(models.origin).parent / "models"
        self._rectangle = dlib.rectangle
        self._detect = dlib.get_frontal_face_detector()
        self._align = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._describe = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 128) float32 unit vectors on the image's device, without gradient."""
        side = max(WORKING_SIZE, image.shape[-1])
        large = F.interpolate(image.float(), (side, side), mode="bicubic", antialias=True)
        pixels = ((large + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        descriptors = np.stack([self._descriptor(np.ascontiguousarray(face)) for face in pixels])
        return F.normalize(torch.as_tensor(descriptors, dtype=torch.float32, device=image.device), dim=1)

    def _descriptor(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (128,) of the largest face."""
        boxes = list(self._detect(pixels))
        side = len(pixels)
        fallback = self._rectangle(*(round(share * side) for share in FALLBACK_BOX))
        box = max(boxes, key=lambda found: found.area(), default=fallback)
        return np.array(self._describe.compute_face_descriptor(pixels, self._align(pixels, box)))
