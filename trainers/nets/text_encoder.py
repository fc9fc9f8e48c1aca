"""A language model as an encoder of words: transformers' ``GPT2Model`` (Radford et al. 2019).

A word's state is the mean of the hidden states of its sub-tokens: the last ones, or those of all layers. Every text
begins after GPT-2's own mark of a beginning: the network spends the state of the very first token on bookkeeping of its
attention, whatever that token is, and without the mark the first word of a sentence, often the one that makes it a
question, would be lost.
"""

from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2Model, GPT2Tokenizer

from datamodules.errors import UserError

# Which hidden states make a word's state: the last; or the embeddings and every layer's, side by side. The last layer
# serves the next word: in a small model words that are followed alike, such as "never" and "really", look alike there.
Layers = Literal["last", "all"]


class TextEncoder(nn.Module):
    """GPT-2 with its tokeniser.

    Args:
        config: arguments of transformers' ``GPT2Config``.
        tokenizer: the tokeniser as ``tokenizers`` writes it in JSON; it has the token :attr:`START`.
    """

    START = "<|endoftext|>"

    def __init__(self, config: dict[str, Any], tokenizer: str) -> None:
        super().__init__()
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.start = self.tokenizer.token_to_id(self.START)
        self.config = GPT2Config(**config)
        self.network = GPT2Model(self.config)

    @classmethod
    def from_hub(cls, name: str) -> "TextEncoder":
        """Loads a GPT-2 of the Hugging Face hub from the local cache (or a local folder); nothing is downloaded.

        Raises:
            UserError: it is not in the cache, of another family, or lacks weights.
        """
        try:
            loaded: Any = GPT2Model.from_pretrained(
                name, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            model, report = loaded
            # With the prefix every word is written as in the middle of a sentence, after a blank.
            tokenizer = GPT2Tokenizer.from_pretrained(name, local_files_only=True, add_prefix_space=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"backbone 'hub:{name}': not in the local cache ({type(error).__name__}); run "
                f"'hf download {name}' where there is a network, or give a local file as path:<file>"
            ) from error
        kind, missing = model.config.model_type, report["missing_keys"]
        if kind != "gpt2" or missing:
            found = f"a model of type '{kind}'" if kind != "gpt2" else f"lacks {len(missing)} weights"
            raise UserError(f"backbone 'hub:{name}': {found}; expected a complete GPT-2, such as hub:gpt2")
        encoder = cls(model.config.to_diff_dict(), tokenizer.backend_tokenizer.to_str())
        encoder.network.load_state_dict(model.state_dict())
        return encoder

    @property
    def dim(self) -> int:
        """Width of one layer's states."""
        return self.config.n_embd

    def width(self, layers: Layers) -> int:
        """Width of a word's state."""
        return self.dim * (self.config.n_layer + 1 if layers == "all" else 1)

    def forward(self, texts: list[list[str]], layers: Layers = "last") -> tuple[Tensor, Tensor]:
        """Encodes texts, each a list of words, with or without their punctuation.

        Returns:
            (B, N, width) float32, one state for each word, zero where padded, and how many words there are, (B,) int64.
        """
        states = [self.encode(words, layers) for words in texts]
        return pad_sequence(states, batch_first=True), torch.tensor([len(words) for words in texts])

    def encode(self, words: list[str], layers: Layers = "last") -> Tensor:
        """One text: (N, width). A word that is no token at all has a state of zeros."""
        encoding = self.tokenizer.encode(words, is_pretokenized=True, add_special_tokens=False)
        states = self.token_states(encoding.ids, layers)
        owner = torch.tensor(encoding.word_ids, dtype=torch.int64, device=states.device)
        sums = states.new_zeros(len(words), states.shape[1]).index_add(0, owner, states)
        return sums / owner.bincount(minlength=len(words)).clamp(min=1)[:, None]

    def token_states(self, ids: list[int], layers: Layers = "last") -> Tensor:
        """Hidden states of the tokens of one text, (M, width).

        A text that is longer than the network's positions is read in windows that overlap by half, so that every token
        but those of the first window sees at least half a window of its past.
        """
        device = self.network.wte.weight.device
        half = (self.config.n_positions - 1) // 2
        states = [torch.zeros(0, self.width(layers), device=device)]
        for first in range(0, max(len(ids) - half, 1) if ids else 0, half):
            window = torch.tensor([[self.start, *ids[first : first + 2 * half]]], device=device)
            read = self.network(window, output_hidden_states=layers == "all")
            chosen = torch.cat(read.hidden_states, dim=-1) if layers == "all" else read.last_hidden_state
            seen = chosen[0, 1:]
            states.append(seen if first == 0 else seen[half:])
        return torch.cat(states)
