"""Every decoding option is read, or refused by name."""

from pathlib import Path

import pytest

from memdlm.errors import ConfigError
from memdlm.inference import PRESETS, GenerationConfig, generate
from memdlm.models import load_model, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 9},
        {"cfg_keep_tokens": (1,)},
        {"max_post_steps": 3},
        {"cache_refresh": 4},
        {"cache_scope": "prefix"},
        {"soft_mask_scale": 0.5},
        {"begin_suppress": "forbid"},
        {"begin_suppress_tokens": (1,), "remasking": "random"},
        {"top_k": 3, "remasking": "random"},
        {"top_p": 0.5, "remasking": "random"},
    ],
    ids=str,
)
def test_an_option_that_nothing_reads_is_refused(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* has no effect .* or leave .* out"):
        GenerationConfig(**options)


@pytest.mark.parametrize("name", ["cache_refresh", "max_post_steps", "soft_mask_top_k", "begin_suppress"])
def test_saying_the_default_does_not_make_it_count(name):
    with pytest.raises(ConfigError, match=f"{name}=.* has no effect"):
        GenerationConfig().refuse_idle([name, "steps"])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_nothing_idle(preset):
    config = GenerationConfig.preset(preset)
    plain = GenerationConfig()
    config.refuse_idle(name for name in vars(config) if getattr(config, name) != getattr(plain, name))


@pytest.mark.parametrize(
    "options", [{"remasking": "random"}, {"transfer_schedule": "llada"}, {"stochastic_transfer": True}]
)
def test_what_a_family_does_not_read_is_refused(options):
    model, tokenizer = (load(GOLDEN / "llada21" / "checkpoint") for load in (load_model, load_tokenizer))
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* has no effect on this model"):
        generate(model, tokenizer, [[5, 6]], GenerationConfig(max_new_tokens=4, **options))


@pytest.mark.parametrize(
    "options", [{"suppress_tokens": (512,)}, {"top_k": 10**6}, {"begin_suppress_tokens": (10**9,)}]
)
def test_tokens_beyond_the_vocabulary_are_refused(options):
    model, tokenizer = (load(GOLDEN / "llada" / "checkpoint") for load in (load_model, load_tokenizer))
    with pytest.raises(ConfigError, match=r"vocabulary|tokens there are"):
        generate(model, tokenizer, [[5, 6]], GenerationConfig(max_new_tokens=4, **options))
