"""A decoder becomes an A2D model: the same function under causal attention, one more token, a folder like others."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from memdlm.cli.main import main
from memdlm.data.tokenizer import PATTERNS, build_pattern_tokenizer, build_word_tokenizer
from memdlm.errors import CheckpointError, ConfigError, DataError
from memdlm.models import BlockCausal, load_model, load_tokenizer
from memdlm.models.hub.converting import convert_decoder
from memdlm.outputs import content
from tiny_foreign import BERT

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3},
}
DECODERS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}
WORDS = [f"w{number}" for number in range(20)]


def decoder(folder, kind, *, rows, tied, **more):
    """Save a decoder and a tokenizer without a mask token; returns the decoder."""
    config_class, model_class, own = DECODERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**{**SIZES, **own, **more}, vocab_size=rows, tie_word_embeddings=tied)).eval()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.6
    model.generation_config.eos_token_id = [0, 1]
    model.save_pretrained(folder)
    tokenizer = build_word_tokenizer(WORDS)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    del rules["model"]["vocab"]["<|mask|>"]
    vocabulary = sorted(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    rules["model"]["vocab"] = {word: number for number, word in enumerate(vocabulary)}
    rules["added_tokens"] = [
        {**each, "id": rules["model"]["vocab"][each["content"]]}
        for each in rules["added_tokens"]
        if each["content"] != "<|mask|>"
    ]
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    facts = {key: value for key, value in facts.items() if key not in ("mask_token", "added_tokens_decoder")}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return model, len(vocabulary)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 4])
@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_a_converted_decoder_is_the_decoder_under_causal_attention(kind, spare, tied, tmp_path, capsys):
    model, size = decoder(tmp_path / "decoder", kind, rows=24 + spare, tied=tied)
    assert size == 24
    assert main(["convert", "--model", str(tmp_path / "decoder"), "--output", str(tmp_path / "made")]) == 0
    made, tokenizer = load_model(tmp_path / "made"), load_tokenizer(tmp_path / "made")
    assert made.config.model_type == f"a2d-{kind}"
    assert tokenizer.mask_token_id == made.config.mask_token_id == size
    # The table grows only where it has no row to spare, and a tied head stays tied.
    assert made.config.vocab_size == max(24 + spare, 25)
    assert (made.lm_head.weight is made.get_input_embeddings().weight) == tied
    assert ("grew" in capsys.readouterr().out) == (spare == 0)
    ids = torch.randint(0, size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits[..., :size]
        assert_close(made(ids, attention_pattern=BlockCausal(1)).logits[..., :size], wanted)
        assert not torch.allclose(made(ids).logits[..., :size], wanted)
    row = made.get_input_embeddings().weight[size]
    assert_close(row, model.get_input_embeddings().weight[:size].mean(0))
    said = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert said["eos_token_id"] == [0, 1]
    assert said["mask_token_id"] == size
    assert not {"do_sample", "temperature"} & set(said)


def test_blocks_are_kept_and_other_tokens_can_be_the_mask(tmp_path):
    decoder(tmp_path, "qwen3", rows=24, tied=True)
    made = convert_decoder(str(tmp_path), mask_token="[M]", block_size=4)
    assert made.model.config.block_size == 4
    assert made.tokenizer.mask_token == "[M]"
    before = torch.random.get_rng_state()
    again = convert_decoder(str(tmp_path), mask_token="w3")
    assert again.tokenizer.mask_token_id == again.tokenizer.get_vocab()["w3"]
    assert again.model.config.vocab_size == 24
    assert torch.random.get_rng_state().equal(before)
    with pytest.raises(ConfigError, match="has a use already"):
        convert_decoder(str(tmp_path), mask_token="<|endoftext|>")


def test_nothing_is_left_out_and_nothing_is_made_up(tmp_path):
    decoder(tmp_path, "qwen2", rows=24, tied=False)
    weights = load_file(tmp_path / "model.safetensors")
    for change, words in (
        ({"model.layers.0.mlp.up_proj.weight": None}, "missing: model.layers.0.mlp.up_proj.weight"),
        ({"model.layers.0.extra.weight": torch.zeros(2)}, "unexpected: model.layers.0.extra.weight"),
    ):
        changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            convert_decoder(str(tmp_path))


def test_what_the_families_lack_is_refused(tmp_path):
    decoder(tmp_path / "a", "llama", rows=24, tied=True)
    path = tmp_path / "a" / "config.json"
    fields = json.loads(path.read_text())
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    path.write_text(json.dumps({**fields, "rope_parameters": scaled}))
    with pytest.raises(ConfigError, match="rotary positions"):
        convert_decoder(str(tmp_path / "a"))


def test_a_folder_of_the_user_is_left_alone(tmp_path, capsys):
    decoder(tmp_path / "a", "qwen3", rows=24, tied=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    arguments = ["convert", "--model", str(tmp_path / "a"), "--output"]
    assert main([*arguments, str(tmp_path / "mine"), "--overwrite", "True"]) == 2
    assert content(tmp_path / "mine") == {"notes.txt"}
    assert main([*arguments, str(tmp_path / "new")]) == 0
    assert main([*arguments, str(tmp_path / "new")]) == 2
    assert main([*arguments, str(tmp_path / "new"), "--overwrite", "True"]) == 0
    assert main([*arguments, str(tmp_path / "b"), "--tie_head", "True"]) == 2
    assert "no effect" in capsys.readouterr().err


def test_a_masked_model_gets_a_type_a_head_and_a_tokenizer(tmp_path, capsys):
    """A BERT whose configuration states no type, with a vocabulary and no tokenizer, as models of 2019 are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(**{**BERT, "vocab_size": 40})).eval()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"CNOScnos()=#123.-", "Br", "Cl", "[Na+]", "[O-]", ">>"]
    for name, whole in (("headed", model), ("headless", model.base_model)):
        folder = tmp_path / name
        whole.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        fields = {key: value for key, value in fields.items() if key not in ("model_type", "architectures")}
        (folder / "config.json").write_text(json.dumps(fields | ({"model_type": "bert"} if name == "headless" else {})))
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
        out, words = tmp_path / f"{name}_made", ["--vocabulary", str(folder / "vocab.txt"), "--pattern", "smiles"]
        arguments = ["convert", "--model", str(folder), "--output", str(out), *words]
        if name == "headless":
            assert main(arguments) == 2
            assert "tie_head" in capsys.readouterr().err
            arguments += ["--tie_head", "True"]
        assert main(arguments) == 0
        made, tokenizer = load_model(out), load_tokenizer(out)
        assert made.config.model_type == "bert"
        assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
        text = "CC[O-].[Na+].BrCC>>CCOCC"
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
        assert "untrained" in capsys.readouterr().out or name == "headed"
    with pytest.raises(ConfigError, match="has a head of its own"):
        load_model(tmp_path / "headed_made", tie_head=True)
    with pytest.raises(CheckpointError, match=r"no tokenizer could be loaded.*memdlm convert --vocabulary"):
        load_tokenizer(tmp_path / "headed")


def test_a_pattern_tokenizer_refuses_what_it_cannot_read():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C"]
    with pytest.raises(DataError, match=r"lacks \[MASK\]"):
        build_pattern_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "C")
    with pytest.raises(DataError, match="'C' twice"):
        build_pattern_tokenizer([*tokens, "C"], "C")
    with pytest.raises(ConfigError, match="no regular expression"):
        build_pattern_tokenizer(tokens, "(")
    tokenizer = build_pattern_tokenizer(tokens, PATTERNS["smiles"])
    assert tokenizer.tokenize("CX[MASK]C") == ["C", "[UNK]", "[MASK]", "C"]
