"""Transformers: attention in every form, and models of the transformers library as they come, randomly initialised."""

from __future__ import annotations

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC


class Attended(nn.Module):
    """Attention of torch's own, behind and before a linear layer."""

    def __init__(self, first: bool = True, separate: bool = False, **options):
        super().__init__()
        sizes = {"kdim": 6, "vdim": 5} if separate else {}
        self.first, self.separate = first, separate
        self.attention = nn.MultiheadAttention(8, 2, batch_first=first, **sizes, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        key, value = (x[..., :6], x[..., :5]) if self.separate else (x, x)
        y = self.attention(x, key, value, need_weights=False)[0]
        return self.head(y if self.first else y.transpose(0, 1))


def factors_and_coverage(model: nn.Module, x: Tensor, **options) -> tuple[dict, dict[str, str]]:
    optimizer = KFAC(
        model, likelihood="categorical", fisher="exact", lr=0.0, factor_fraction=1.0, compile=False, **options
    )
    model(x).sum().backward()
    optimizer.step()
    return optimizer.factors(), optimizer.coverage()


@pytest.mark.parametrize("separate", [False, True])
def test_attention_is_covered_whichever_axis_is_first_and_in_inference_mode(separate):
    """Its fast path knows no gradients, and is no use of the weights; a module in eval mode is seen like any other."""
    torch.manual_seed(0)
    model, x = Attended(separate=separate).double(), dense.randn(3, 4, 8)
    found, coverage = factors_and_coverage(model, x)
    alone = {"attention.in_proj_bias"} if separate else set()  # the bias of three weights
    assert {name for name, block in coverage.items() if block == "fallback"} == alone
    model.zero_grad()
    model.attention.eval()
    evaluated, same = factors_and_coverage(model, x)
    assert same == coverage
    dense.assert_factors_equal(evaluated, found)
    turned = Attended(first=False, separate=separate).double()
    turned.load_state_dict(model.state_dict())
    other, same = factors_and_coverage(turned, x.transpose(0, 1))
    assert same == coverage
    dense.assert_factors_equal(other, found)


class Written(nn.Module):
    """Attention by scaled_dot_product_attention, with the projections as linear layers."""

    def __init__(self, attention: nn.MultiheadAttention, head: nn.Linear):
        super().__init__()
        self.projected, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), head
        with torch.no_grad():
            self.projected.weight.copy_(attention.in_proj_weight)
            self.projected.bias.copy_(attention.in_proj_bias)
            self.out.weight.copy_(attention.out_proj.weight)
            self.out.bias.copy_(attention.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.projected(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(y))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_scaled_dot_product_attention_is_the_module(sharing):
    """The same out-projection factors; the packed one sees q, k and v as three uses of a third of its rows each."""
    torch.manual_seed(0)
    model, x = Attended().double(), dense.randn(3, 4, 8)
    written = Written(model.attention, nn.Linear(8, 3)).double()
    written.head.load_state_dict(model.head.state_dict())
    found, _ = factors_and_coverage(model, x, weight_sharing=sharing)
    wanted, _ = factors_and_coverage(written, x, weight_sharing=sharing)
    dense.assert_factors_equal({"": found["attention.out_proj"]}, {"": wanted["out"]})


def test_sharing_by_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = dense.randn(5, 6, 4)
    each = {s: dense.kfac_factors(model, x, weight_sharing=s) for s in ("expand", "reduce")}
    mixed = dense.kfac_factors(model, x, weight_sharing={"2": "reduce"})
    dense.assert_factors_equal(mixed, {"0": each["expand"]["0"], "2": each["reduce"]["2"]})
    first = dense.kfac_factors(model, x, weight_sharing={"0": "reduce", "*": "expand"})
    dense.assert_factors_equal(first, {"0": each["reduce"]["0"], "2": each["expand"]["2"]})
    with pytest.raises(ValueError, match=r"weight_sharing has 'encoder\.\*', which fits no layer; they are 0, 0\.bias"):
        KFAC(model, likelihood="gaussian", weight_sharing={"encoder.*": "reduce"})
    with pytest.raises(ValueError, match="weight_sharing must be one of 'expand', 'reduce'; got 'sum'"):
        KFAC(model, likelihood="gaussian", weight_sharing={"0": "sum"})


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.table(tokens))))


def test_padding_is_left_out_of_every_block():
    """Sentences padded to one length, with a mask, have the factors of the sentences alone."""
    torch.manual_seed(0)
    model = Words().double()
    short, padded = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3, 0, 0]])
    options = {"likelihood": "categorical", "mask": lambda tokens, z: tokens != 0}
    dense.assert_factors_equal(
        dense.kfac_factors(model, padded, **options), dense.kfac_factors(model, short, likelihood="categorical")
    )


# ------------------------------------------------------------------------------------------- the transformers library

transformers = pytest.importorskip("transformers")
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def gpt2():
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 31, "n_positions": 12}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def bert():
    config = transformers.BertConfig(vocab_size=31, max_position_embeddings=12, **SMALL)
    return transformers.BertForSequenceClassification(config)


def bert_masked():
    config = transformers.BertConfig(vocab_size=31, max_position_embeddings=12, **SMALL)
    return transformers.BertForMaskedLM(config)


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))


def llama():
    config = transformers.LlamaConfig(vocab_size=31, max_position_embeddings=16, num_key_value_heads=1, **SMALL)
    return transformers.LlamaForCausalLM(config)


def gemma():
    """Its norms hold their scale less one."""
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(vocab_size=31, head_dim=8, num_key_value_heads=1, **SMALL)
    )


TOKENS = torch.randint(0, 31, (4, 7), generator=torch.Generator().manual_seed(0))
MODELS = {
    "gpt2": (gpt2, {"input_ids": TOKENS}),
    "bert": (bert, {"input_ids": TOKENS}),
    "bert, masked": (bert_masked, {"input_ids": TOKENS}),
    "vit": (vit, {"pixel_values": torch.randn(4, 3, 8, 8)}),
    "llama": (llama, {"input_ids": TOKENS}),
    "gemma": (gemma, {"input_ids": TOKENS}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_library_is_covered_whole(name):
    """Every matrix, and every norm, bias and positional parameter too; and it trains."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make().train()
    optimizer = KFAC(model, likelihood="categorical", lr=0.03, damping=1e-2, compile=False)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        z = model(**inputs).logits
        targets = TOKENS.flatten() if z.dim() == 3 else torch.arange(len(z)) % z.shape[-1]
        loss = F.cross_entropy(z.flatten(0, -2), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    coverage = optimizer.coverage()
    assert {
        n for n, block in coverage.items() if block == "fallback" and model.get_parameter(n).grad is not None
    } == set()
    assert losses[-1] < 0.9 * losses[0]
    if name in ("gpt2", "bert, masked"):
        tied = model.get_input_embeddings().weight
        assert next(block for n, block in coverage.items() if model.get_parameter(n) is tied) == "tied"
    if name == "gpt2":
        assert coverage["transformer.h.0.attn.c_attn.weight"] == "linear"


def test_memory_grows_with_the_vocabulary_and_not_with_its_square():
    """A tied table of 20,000 words: its counts and diagonal, a factor for its width."""
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40_000, **sizes))
    optimizer = KFAC(model, likelihood="categorical")
    assert optimizer.coverage()["transformer.wte.weight"] == "tied (diagonal G)"
    usage = optimizer.memory_usage()
    assert usage["factors"] < 40_000 * 8 * 4
