"""Times a merge of three small adapters in a cold process: jaxmerge's command line against PEFT.

    python scripts/bench_cold.py [--repeats 5]

PEFT needs the base model; here it gets one with random weights from its configuration, which is quicker than
loading one. Both read the adapters in tests/adapters and write a merged adapter. Needs the test extra.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ADAPTERS = [str(Path(__file__).parent.parent / "tests" / "adapters" / name) for name in ("sms", "movie", "names")]

WITH_PEFT = """
import sys, transformers, peft
*folders, type_, out = sys.argv[1:]
config = transformers.BertConfig(vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                                 intermediate_size=1536)
model = peft.PeftModel.from_pretrained(transformers.BertModel(config), folders[0], adapter_name="a0")
names = ["a0"]
for i, folder in enumerate(folders[1:], 1):
    names.append(f"a{i}")
    model.load_adapter(folder, names[-1])
model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=type_)
model.save_pretrained(out, selected_adapters=["merged"])
"""


def seconds(command: list[str], repeats: int) -> float:
    """Median wall seconds of a command."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints the median times of both, and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        for type_ in ("cat", "svd"):
            ours = [sys.executable, "-m", "jaxmerge", "merge", *ADAPTERS, "--weights", "1", "1", "1"]
            ours += ["--combination-type", type_, "-o", f"{folder}/ours", "--force"]
            theirs = [sys.executable, "-c", WITH_PEFT, *ADAPTERS, type_, f"{folder}/theirs"]
            mine, peft = seconds(ours, repeats), seconds(theirs, repeats)
            print(f"{type_:4}  jaxmerge {mine:6.2f} s   PEFT {peft:6.2f} s   ratio {peft / mine:4.1f} ×")


if __name__ == "__main__":
    main()
