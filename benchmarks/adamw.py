"""What AdamW's own part of a step costs in one pass over the weights, against one pass for each of its operations.

    python benchmarks/adamw.py --model tiny
    python benchmarks/adamw.py --model smollm2 --rounds 3 --steps 3

Both optimisers step the same gradients in turn, in one process and on one thread, in processor time; no forward or
backward pass is made. The figure is the median over rounds of the ratio within a round, and its range.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from immunity.models import load


def stepping(model: str, *, fused: bool) -> torch.optim.AdamW:
    """AdamW on weights of its own with gradients that stay, after the step that makes its moments."""
    network = load(model).network
    generator = torch.Generator().manual_seed(0)
    for one in network.parameters():
        one.grad = torch.randn(one.shape, generator=generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=fused)
    optimizer.step()
    return optimizer


def seconds(optimizer: torch.optim.AdamW, steps: int) -> float:
    """Processor time of one step."""
    began = time.process_time()
    for _ in range(steps):
        optimizer.step()
    return (time.process_time() - began) / steps


def main() -> None:
    """Print the two times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    one, many = stepping(asked.model, fused=True), stepping(asked.model, fused=False)
    rounds = [(seconds(one, asked.steps), seconds(many, asked.steps)) for _ in range(asked.rounds)]
    fast, slow = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratios = [a / b for a, b in rounds]
    print(f"{asked.model}: {fast * 1e3:.2f} ms in one pass, {slow * 1e3:.2f} ms in many")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")


if __name__ == "__main__":
    main()
