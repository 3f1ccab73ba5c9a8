"""The vLLM plugin: bindings of three layouts, what goes where, and what stops the start."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import sys
import types

import pytest
import torch

from rectokens.integrations.vllm.plugin import PluginError, register
from rectokens.prompt_embeds import PromptEmbedsError, dump_payload, dump_tensor
from rectokens.turboquant import encode_embeddings, quantizer_for

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
CODES = encode_embeddings(X, 8)
PAYLOAD = dump_payload(*CODES, 8, 64).encode()
DECODED = quantizer_for(64, 8).decode(*CODES)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return base64.b64encode(buffer.getvalue())


@pytest.fixture
def config():
    """What the plugin reads of vLLM's model configuration."""
    return types.SimpleNamespace(
        enable_prompt_embeds=True,
        max_model_len=32,
        dtype=torch.bfloat16,
        get_hidden_size=lambda: 64,
    )


def test_the_entry_point_is_what_vllm_looks_for():
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    ours = [point for point in points if point.value.startswith("rectokens.")]
    if not ours:
        pytest.skip("installed before the package had this entry point")
    assert ours[0].load() is register


def test_payloads_are_decoded_wherever_vllm_reads_them(fake_vllm, config):
    register()
    for read in (fake_vllm.render, fake_vllm.read_chat):
        embeds = read(config, PAYLOAD)
        assert embeds.dtype == torch.bfloat16
        assert embeds.device.type == "cpu"
        assert torch.equal(embeds, DECODED.bfloat16())
    assert fake_vllm.calls == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_plain_tensors_go_to_vllm_as_they_came(fake_vllm, config, dtype):
    register()
    data = saved(X.to(dtype))
    assert torch.equal(fake_vllm.render(config, data), X.to(dtype).bfloat16())
    assert torch.equal(fake_vllm.read_chat(config, data), X.to(dtype).bfloat16())
    assert [call[1] for call in fake_vllm.calls] == [data, data]
    # A shape that is wrong is vLLM's to refuse, in its own words.
    assert fake_vllm.render(config, saved(torch.ones(3, 7))).shape == (3, 7)


def test_without_the_flag_vllm_says_so(fake_vllm, config):
    register()
    config.enable_prompt_embeds = False
    with pytest.raises(ValueError, match="--enable-prompt-embeds"):
        fake_vllm.render(config, PAYLOAD)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"&&&&", "not strict base64"),
        (b"AAAA", "not a zip archive"),
        (dump_payload(*encode_embeddings(torch.ones(2, 128)), 4, 128).encode(), "size is 64"),
        (dump_payload(*encode_embeddings(torch.ones(33, 64)), 4, 64).encode(), "33 tokens"),
        (b"A" * 200_000, "allowed are"),
    ],
    ids=["base64", "archive", "hidden size", "tokens", "bytes"],
)
def test_bad_payloads_are_value_errors_that_vllm_never_sees(fake_vllm, config, data, message):
    register()
    for read in (fake_vllm.render, fake_vllm.read_chat):
        with pytest.raises(PromptEmbedsError, match=message):
            read(config, data)
    assert fake_vllm.calls == []


def test_an_expanded_view_is_refused_before_vllm_would_make_room_for_it(fake_vllm, config):
    register()
    with pytest.raises(PromptEmbedsError, match="not contiguous"):
        fake_vllm.render(config, saved(torch.zeros(1, 1).expand(1 << 20, 64)))
    assert fake_vllm.calls == []


def test_registering_again_changes_nothing(fake_vllm, config):
    register()
    bound = [dict(vars(m)) for m in (fake_vllm.home, fake_vllm.base, fake_vllm.chat)]
    register()
    assert [dict(vars(m)) for m in (fake_vllm.home, fake_vllm.base, fake_vllm.chat)] == bound
    fake_vllm.render(config, dump_tensor(X).encode())
    assert len(fake_vllm.calls) == 1


def test_a_module_loaded_between_two_calls_is_found(fake_vllm, monkeypatch):
    late = types.ModuleType("vllm.late")
    late.load = fake_vllm.home.safe_load_prompt_embeds
    register()
    monkeypatch.setitem(sys.modules, "vllm.late", late)
    register()
    assert late.load is fake_vllm.home.safe_load_prompt_embeds


@pytest.mark.parametrize("missing", ["home", "function", "base", "chat", "make_async"])
def test_a_layout_it_does_not_know_stops_the_start(fake_vllm, version, missing, monkeypatch):
    if missing == "home":
        monkeypatch.delitem(sys.modules, "vllm.renderers.embed_utils")
    elif missing == "function":
        del fake_vllm.home.safe_load_prompt_embeds
    elif missing == "base":
        del fake_vllm.base.safe_load_prompt_embeds
    elif missing == "chat":
        del fake_vllm.chat.safe_load_prompt_embeds
        del fake_vllm.chat.safe_load_prompt_embeds_async
    else:
        del sys.modules["vllm.utils.async_utils"].make_async
    with pytest.raises(PluginError, match=rf"vLLM {version}: .*0\.21 to 0\.33"):
        register()


def test_a_binding_that_cannot_be_replaced_is_named(fake_vllm):
    class Stubborn(types.ModuleType):
        def __setattr__(self, name, value):
            if name != "safe_load_prompt_embeds":
                super().__setattr__(name, value)

    fake_vllm.base.__class__ = Stubborn
    with pytest.raises(PluginError, match=r"vllm\.renderers\.base\.safe_load_prompt_embeds"):
        register()


def test_an_import_inside_vllm_that_fails_is_not_a_missing_module(fake_vllm, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "vllm.renderers.base":
                raise ModuleNotFoundError("No module named 'needed'", name="needed")

    monkeypatch.delitem(sys.modules, "vllm.renderers.base")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="needed"):
        register()


def test_the_vllm_that_is_installed():
    """In an environment with vLLM; `examples/scripts/interop` tries a running server."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    register()
    from vllm.renderers import base

    assert hasattr(base.safe_load_prompt_embeds, "_rectokens_original")
