"""A forward pass on weights that are attached, mapped from a file, and private.

    python bench/forward.py [--layers 8] [--rounds 9] [--results FOLDER]

A Llama of random bf16 weights, hidden size 1024, whose parameters are those tensors themselves, without a copy. All
sides compute the same logits, bit by bit (checked). Passes are over one token, which reads each weight once, as a
server's decoding does, and over many, as reading a prompt does. `first` is the first pass after the tensors were made,
over one token: it maps the pages that are attached or in the page cache; reading private weights is no part of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _daemon import scratch, serving
from _results import Comparison, Report, add_options, turns
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import weightd

State = dict[str, torch.Tensor]
PROMPT = 128


class Passes:
    """A model whose weights can be replaced."""

    def __init__(self, layers: int) -> None:
        configuration = LlamaConfig(
            hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, intermediate_size=4096,
            num_hidden_layers=layers, vocab_size=8192, max_position_embeddings=1024, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(configuration).to(torch.bfloat16).eval()
        self._tokens = torch.arange(PROMPT)[None]

    def weights(self) -> State:
        return {name: tensor.detach().contiguous() for name, tensor in self.model.state_dict().items()}

    def use(self, state: State) -> None:
        self.model.load_state_dict(state, assign=True)

    def run(self, tokens: int) -> tuple[float, torch.Tensor]:
        """Milliseconds, and logits."""
        with torch.inference_mode():
            start = time.perf_counter()
            logits = self.model(input_ids=self._tokens[:, :tokens], use_cache=False).logits
            return (time.perf_counter() - start) * 1e3, logits


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint for the time (default: the system's)")
    add_options(parser, rounds=15, seconds=14)
    options = parser.parse_args()
    torch.set_num_threads(1)  # or, where something else runs, its threads mostly wait for each other
    passes = Passes(options.layers)
    weights = passes.weights()
    size = sum(tensor.nbytes for tensor in weights.values())
    parameters = {"bytes": size, "tensors": len(weights), "tokens of a prompt": PROMPT, "threads": 1}
    report = Report("forward", parameters, packages=("weightd", "torch", "transformers", "safetensors"))
    with scratch(options.folder) as folder, serving(folder, "forward", "--budget", str(size * 2)) as daemon:
        path = folder / "m.safetensors"
        save_file(weights, path)
        with weightd.connect(daemon.socket) as client:
            client.load(path, name="m", pin=True)

            def attached() -> State:
                return client.attach("m").state_dict()

            sides: dict[str, Callable[[], State]] = {
                "weightd": attached,
                "safetensors mmap": lambda: load_file(path),
                "private": lambda: {name: tensor.clone() for name, tensor in load_file(path).items()},
            }
            states = {name: make() for name, make in sides.items()}

            def milliseconds(state: State, tokens: int) -> float:
                passes.use(state)
                took, logits = passes.run(tokens)
                if not torch.equal(logits, expected[tokens]):
                    raise SystemExit("a side computed other logits")
                return took

            expected = {tokens: passes.run(tokens)[1] for tokens in (1, PROMPT)}
            for name, what, tokens, predicted, private in (
                ("token", "a forward pass over one token", 1,
                 "1.0 × mmap; to 1.2 × private, if that has huge pages", 1.2),
                ("prompt", "a forward pass over a prompt", PROMPT, "1.0 × both: it computes more than it reads", 1.0),
            ):  # fmt: skip
                samples = turns(
                    {side: (lambda state=state: milliseconds(state, tokens)) for side, state in states.items()},  # noqa: B023  # called here
                    options.rounds, options.seconds,
                )  # fmt: skip
                aims = {"safetensors mmap": 1.0, "private": private}
                report.add(Comparison(name, what, "ms", samples, predicted, aims=aims))
            states.clear()
            first = turns(
                {side: (lambda make=make: milliseconds(make(), 1)) for side, make in sides.items()},
                options.rounds, options.seconds,
            )  # fmt: skip
            passes.use(weights)
            report.add(Comparison(
                "first", "the first forward pass over one token after the tensors were made", "ms", first,
                "the pages are mapped: 60 ms for half a GB more than private; mmap's are mapped faster",
            ))  # fmt: skip
    report.write(options.results)


if __name__ == "__main__":
    main()
