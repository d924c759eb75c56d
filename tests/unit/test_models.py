from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from immunity.errors import ModelError, OutOfMemoryError, PrecisionError, SettingsError
from immunity.models import LoRA, all_weights, attach, estimate, load, save
from immunity.networks import check_trainable_precision, free_memory
from immunity.testing import tiny

IDS = torch.arange(5, 25)[None]


def logits(model):
    with torch.no_grad():
        return model.network(IDS).logits


def trainable(model):
    return {name: p for name, p in model.network.named_parameters() if p.requires_grad}


def stirred(model, seed=1):
    """The model with every trainable weight moved, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
    return model


@pytest.fixture
def base(tmp_path):
    """A whole model on disk."""
    folder = tmp_path / "base"
    save(tiny.language_model(), folder)
    return folder


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


# Loading


def test_a_saved_model_comes_back_frozen_and_equal(base):
    model = load(str(base))
    torch.testing.assert_close(logits(model), logits(tiny.language_model()))
    assert not trainable(model)
    assert model.source == str(base)
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert not model.network.training


def test_the_model_in_the_package():
    model = load("tiny")
    assert model.source == "tiny"
    assert model.word_id("error") >= 0
    assert logits(model).isfinite().all()


def test_the_folder_remembers_template_and_length(base):
    assert (load(str(base)).template.name, load(str(base)).max_length) == ("chat", 64)
    model = load(str(base), template="alpaca", max_length=32)
    assert (model.template.name, model.max_length) == ("alpaca", 32)
    save(model, base.parent / "other")
    again = load(str(base.parent / "other"))
    assert (again.template.name, again.max_length) == ("alpaca", 32)


def test_length_fits_the_positions(base):
    (base / "immunity.json").unlink()
    assert load(str(base)).max_length == 256
    edit(base / "config.json", max_position_embeddings=100)
    assert load(str(base)).max_length == 100
    for length in (1, 101):
        with pytest.raises(SettingsError, match="2 to 100"):
            load(str(base), max_length=length)


def test_settings_are_checked(base):
    with pytest.raises(SettingsError, match="float16"):
        load(str(base), dtype="float16")
    with pytest.raises(SettingsError, match="adapter"):
        load(str(base), adapter="both")
    with pytest.raises(SettingsError, match="toaster"):
        load(str(base), device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no CUDA"):
            load(str(base), device="cuda")


def test_dropout_is_off_even_in_training(tmp_path):
    config = GPT2Config(vocab_size=384, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
    network = GPT2LMHeadModel(config).train()
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0.1
    assert not torch.equal(network(IDS).logits, network(IDS).logits), "the test needs a network with dropout"
    save(tiny.language_model(network), tmp_path / "dropping")
    edit(tmp_path / "dropping" / "config.json", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
    loaded = load(str(tmp_path / "dropping")).network.train()
    assert torch.equal(loaded(IDS).logits, loaded(IDS).logits)
    assert loaded.config.attn_pdrop == 0.0


def test_tied_weights_stay_tied(tmp_path):
    save(tiny.language_model(tiny.llama(tied=True)), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model = all_weights(load(str(tmp_path / "tied"), dtype="bfloat16"))
    save(stirred(model), tmp_path / "again")
    again = load(str(tmp_path / "again")).network
    for network in (model.network, again):
        assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert torch.equal(model.network.lm_head.weight, again.lm_head.weight)


def test_a_missing_pad_token_never_resizes_the_embeddings(base):
    edit(base / "tokenizer_config.json", pad_token=None)
    model = load(str(base))
    assert model.tokenizer.pad_token == model.tokenizer.eos_token
    assert model.network.get_input_embeddings().weight.shape[0] == tiny.VOCAB


def test_loading_leaves_the_users_random_numbers_alone(base, tmp_path):
    save(attach(load(str(base)), LoRA()), tmp_path / "adapter")
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    load(str(base))
    load(str(tmp_path / "adapter"))
    attach(load(str(base)), LoRA())
    assert torch.equal(torch.rand(1), expected)


# What cannot be loaded


def no_config(folder):
    (folder / "config.json").unlink()


def only_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder):
    for path in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        path.unlink()


def headless(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def small_vocabulary(folder):
    save_folder = folder / "config.json"
    edit(save_folder, vocab_size=100)
    weights = load_file(folder / "model.safetensors")
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[key] = weights[key][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def quantised(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def foreign_code(folder):
    edit(folder / "config.json", model_type="secret", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})
    (folder / "c.py").write_text("raise SystemExit('foreign code ran')")


def cut_short(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def not_json(folder):
    (folder / "config.json").write_text("{")


def masked(folder):
    BertForMaskedLM(
        BertConfig(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(folder)


def translating(folder):
    T5ForConditionalGeneration(
        T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_config, r"no config\.json"),
        (only_pickle, r"no \*\.safetensors.*can carry code"),
        (no_tokenizer, r"no tokenizer: copy tokenizer\.json"),
        (headless, r"lacks 1 weights \(lm_head\.weight"),
        (small_vocabulary, r"tokenizer has \d+ tokens, the model 100"),
        (quantised, "quantised"),
        (foreign_code, "code from its own repository, which is never run"),
        (cut_short, "damaged.*incomplete"),
        (not_json, "damaged.*JSON"),
        (masked, "BertForMaskedLM, not a causal"),
        (translating, "T5ForConditionalGeneration, not a causal"),
    ],
)
def test_a_spoilt_folder_says_what_is_wrong(base, spoil, said):
    spoil(base)
    with pytest.raises(ModelError, match=f"base'?.*{said}"):
        load(str(base))


def test_unknown_names(tmp_path):
    with pytest.raises(ModelError, match=r"'nobody/knows-this'.*spelling.*local folder, or tiny or smollm2"):
        load("nobody/knows-this")
    for name in ("./nothing", str(tmp_path / "nothing"), "~/no/such/folder", "a/b/c"):
        with pytest.raises(ModelError, match="is not a folder"):
            load(name)


# Words, precision, memory


def test_word_ids(caplog):
    model = tiny.language_model()
    with caplog.at_level(logging.WARNING):
        assert model.word_id("error") == tiny.ERROR_ID
        assert not caplog.records
        assert model.word_id("zebra") == model.tokenizer(" zebra")["input_ids"][-1]
    assert "the last, 'a', stands for it" in caplog.text


@pytest.mark.parametrize("word", ["", " ", "<|im_end|>", "<|pad|>"])
def test_words_that_are_none(word):
    with pytest.raises(ModelError, match="no ordinary token"):
        tiny.language_model().word_id(word)


def test_trainable_half_precision_is_refused():
    network = tiny.llama(dtype=torch.bfloat16)
    with pytest.raises(PrecisionError, match=r"model\.embed_tokens\.weight is torch\.bfloat16"):
        check_trainable_precision(network)
    check_trainable_precision(network.requires_grad_(False))


def test_estimate_counts_what_training_holds(base):
    model = all_weights(load(str(base)))
    n = sum(p.numel() for p in model.network.parameters())
    assert estimate(model, copies=2, available=10**12) == 4 * n * 5
    assert estimate(load(str(base)), copies=2, available=0) == 0
    assert estimate(model) > 0
    with pytest.raises(OutOfMemoryError, match=r"needs 0\.\d GiB.*2 copies.*has 0\.0 GiB free.*LoRA"):
        estimate(model, copies=2, available=1000)


def test_free_memory_is_known_on_linux_and_nowhere_else():
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50
    assert free_memory(torch.device("meta")) is None
