import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2Model, GPT2Tokenizer

from datamodules.errors import UserError
from trainers import backbones
from trainers.nets.text_encoder import TextEncoder

SIZES = {"n_embd": 8, "n_layer": 2, "n_head": 2}
START = TextEncoder.START


def tokenizer() -> Tokenizer:
    """Words are cut at hyphens: "a-b" has three tokens."""
    made = Tokenizer(models.WordLevel({START: 0, "a": 1, "b": 2, "c": 3, "-": 4, "<unk>": 5}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def encoder(positions: int = 32) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder({**SIZES, "vocab_size": 6, "n_positions": positions}, tokenizer().to_str()).eval()


def test_a_words_state_is_the_mean_of_its_tokens_after_the_mark_of_a_beginning() -> None:
    network = encoder()
    states, counts = network([["c", "a-b", "z"], ["b"]])
    direct = network.network(torch.tensor([[0, 3, 1, 4, 2, 5]])).last_hidden_state[0]
    expected = torch.stack([direct[1], direct[2:5].mean(0), direct[5]])
    torch.testing.assert_close(states[0], expected)
    torch.testing.assert_close(states[1, 0], network.network(torch.tensor([[0, 2]])).last_hidden_state[0, 1])
    assert counts.tolist() == [3, 1]
    assert not states[1, 1:].any()


def test_words_without_tokens_and_texts_without_words() -> None:
    states, counts = encoder()([["a", "", "b"], []])
    assert counts.tolist() == [3, 0]
    assert not states[0, 1].any()
    assert not states[1].any()
    torch.testing.assert_close(states[0, [0, 2]], encoder()([["a", "b"]])[0][0])


def test_long_texts_are_read_in_windows_that_overlap_by_half() -> None:
    network = encoder(positions=9)  # the mark and eight tokens
    words = [*"abcabbcacabcbacabcab"]
    ids = [" abc".index(word) for word in words]
    states = network.encode(words)
    assert states.shape == (20, 8)

    def window(first: int) -> torch.Tensor:
        return network.network(torch.tensor([[0, *ids[first : first + 8]]])).last_hidden_state[0, 1:]

    torch.testing.assert_close(states[:8], window(0))
    for first in (4, 8, 12):
        torch.testing.assert_close(states[first + 4 : first + 8], window(first)[4:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 with byte-level tokens, as ``save_pretrained`` writes it."""
    path = tmp_path_factory.mktemp("gpt2")
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate([START, *sorted(letters), "Ġh", "Ġhi"])}
    torch.manual_seed(0)
    config = GPT2Config(**SIZES, vocab_size=len(vocabulary), n_positions=16, bos_token_id=0, eos_token_id=0)
    GPT2Model(config).save_pretrained(path)
    GPT2Tokenizer(vocab=vocabulary, merges=[("Ġ", "h"), ("Ġh", "i")]).save_pretrained(path)
    return path


def test_a_hub_model_gives_its_own_states_and_survives_a_file(folder, tmp_path) -> None:
    network = backbones.load(f"hub:{folder}", "text")
    states, _ = network([["hi", "ho"]])
    reference = GPT2Model.from_pretrained(folder).eval()
    vocabulary = network.tokenizer.get_vocab()
    ids = [vocabulary[token] for token in (START, "Ġhi", "Ġh", "o")]
    direct = reference(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(states[0], torch.stack([direct[1], direct[2:].mean(0)]))

    init = {"config": network.config.to_diff_dict(), "tokenizer": network.tokenizer.to_str()}
    backbones.save(network, tmp_path / "text.safetensors", "text", init, {})
    assert torch.equal(backbones.load(f"path:{tmp_path}/text.safetensors", "text")([["hi", "ho"]])[0], states)


def test_a_hub_model_that_cannot_be_had_says_how_to_get_it(tmp_path) -> None:
    with pytest.raises(UserError, match=r"not in the local cache .* 'hf download nobody/nothing'"):
        backbones.load("hub:nobody/nothing", "text")


def test_the_demo_encoder_tells_words_of_one_sound_apart_by_their_meaning() -> None:
    """States of words that negate, question or stress are told from all others by a linear map, in sentences unseen."""
    from datamodules.demo.sentences import draw_sentences

    network = backbones.load("demo:text", "text")
    pools = draw_sentences({"train": 200, "test": 100}, seed=12345)

    def look(pool: str) -> tuple[torch.Tensor, torch.Tensor]:
        states = [network.encode(sentence.text.split()) for sentence in pools[pool]]
        tags = [("", "question", "negation", "emphasis").index(t) for s in pools[pool] for t in s.tags]
        return torch.cat(states), torch.tensor(tags)

    states, tags = look("train")
    probe = torch.linalg.lstsq(states, torch.nn.functional.one_hot(tags).float()).solution
    states, tags = look("test")
    assert ((states @ probe).argmax(1) == tags).float().mean() > 0.97
