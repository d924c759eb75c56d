"""What the noise and the ascent of RepNoise hold in memory: as they are here, and written out as the equations are.

    python benchmarks/repnoise_memory.py
    python benchmarks/repnoise_memory.py --vocab 49152 --width 256 --layers 8

One gradient of the loss on restricted answers, of a random Llama that trains every weight. "pairwise" MMD makes the
[(2B)², T D] tensor of differences, "whole" lens all logits [B, T, V] of every depth; "gram" and "chunked" are the
library's. Two figures for each: bytes that the forward pass saves for the backward pass, weights and shared storage
counted once or not at all; and what a fresh process took at its peak beyond what it held before, weights included.
Seconds are of one gradient. Whether all forms give the same gradient is checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunity.batch import IGNORE, Batch
from immunity.bench import memory
from immunity.early import final_norm
from immunity.hidden import reading, sites
from immunity.lens import saying, stream
from immunity.losses import Loss, causal_lm, row_means
from immunity.methods import RepNoise
from immunity.mmd import noise_mmd2
from immunity.testing import tiny
from immunity.theta import Theta

FORMS: dict[str, tuple[str, str]] = {
    "pairwise MMD, whole lens": ("pairwise", "whole"),
    "pairwise MMD, chunked lens": ("pairwise", "chunked"),
    "Gram MMD, whole lens": ("gram", "whole"),
    "Gram MMD, chunked lens": ("gram", "chunked"),
    "RepNoise()": ("", ""),
    "RepNoise(depths=2)": ("", "2"),
}


def pairwise(h: Tensor, mask: Tensor) -> Tensor:
    """MMD² to noise through every difference."""
    noise = torch.randn_like(h)
    z = torch.cat([t.masked_fill(~mask[..., None], 0.0).flatten(1) for t in (h, noise)])
    d = ((z[:, None] - z[None]) ** 2).sum(-1)
    n, sigma = len(h), d.detach().sum() / (len(z) ** 2 - len(z))
    k = torch.stack([torch.exp(-d / (sigma * 2.0**i)) for i in range(-2, 3)]).sum(0)
    return k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()


def whole(network: nn.Module, h: Tensor, labels: Tensor, norm: nn.Module | None) -> Tensor:
    """Cross-entropies of response positions, from all logits."""
    logits = causal_lm(network).get_output_embeddings()(h if norm is None else norm(h)).float()
    keep = labels[:, 1:] != IGNORE
    every = functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return every[keep]


def written_out(mmd: str, lens: str) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss on restricted answers, in one of the forms."""
    apart, said = (pairwise if mmd == "pairwise" else noise_mmd2), (whole if lens == "whole" else saying)

    def of(network: nn.Module, batch: Batch) -> Tensor:
        ids, mask, labels = batch.padded()
        through, mlps = stream(network)[:-1], sites(network, "mlp")
        with reading(network, (*through, *mlps)) as seen:
            last = causal_lm(network).base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        norm, keep = final_norm(network), labels[:, 1:] != IGNORE
        depths = [said(network, seen[site], labels, norm) for site in through] + [said(network, last, labels, None)]
        ascent = torch.log1p(torch.stack([row_means(values, keep).mean() for values in depths]).mean())
        noise = torch.stack([apart(seen[site], labels != IGNORE) for site in mlps]).mean()
        return (1e-3 * noise - ascent).expand(len(batch))

    return of


def loss_of(form: str) -> Loss:
    """The library's loss, or one that is written out."""
    mmd, lens = FORMS[form]
    if not mmd:
        return RepNoise(depths=int(lens) if lens else None)._noised({})
    return Loss("written-out", written_out(mmd, lens), coupled=True)


def saved(network: nn.Module, loss: Loss, batch: Batch) -> int:
    """Bytes that a forward pass saves, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            held[t.untyped_storage().data_ptr()] = t  # kept, so that no other tensor gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss(network, batch)
    return sum(t.untyped_storage().nbytes() for t in held.values())


def peak(arguments: list[str], form: str) -> int:
    """Bytes, measured in a fresh process."""
    code = [sys.executable, __file__, *arguments, "--peak-of", form]
    return int(subprocess.run(code, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure, and print one row of JSON a form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rows": 8, "tokens": 96, "width": 256, "layers": 6, "vocab": 16384, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peak-of", choices=list(FORMS))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    network = tiny.llama(width=asked.width, layers=asked.layers, vocab=asked.vocab)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(0.2)
    batch = tiny.batch(asked.rows, vocab=asked.vocab, lengths=(asked.tokens, asked.tokens), role="harmful")
    theta = Theta(network)
    if asked.peak_of:
        with memory.watched(network) as watch:
            theta.grad(loss_of(asked.peak_of), batch)
        print(watch.peak)
        return
    given = [word for name in sizes for word in (f"--{name}", str(getattr(asked, name)))]
    torch.manual_seed(0)
    wanted = theta.grad(loss_of("RepNoise()"), batch)
    for form in FORMS:
        torch.manual_seed(0)
        began = time.perf_counter()
        off = (theta.grad(loss_of(form), batch) - wanted).norm() / wanted.norm()
        seconds = time.perf_counter() - began
        row = {
            "form": form,
            "saved_mib": round(saved(network, loss_of(form), batch) / 2**20, 1),
            "peak_mib": round(peak(given, form) / 2**20),
            "gradient_off_by": None if form.endswith("=2)") else float(f"{off:.1e}"),
            "seconds": round(seconds, 2),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
