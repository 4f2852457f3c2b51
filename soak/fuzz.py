"""A fuzzer for what is read: mutates configs and checkpoints as coverage suggests, and stops at all but a result or one line.

pip install -e ".[fuzz]"
python -m soak.fuzz config --seconds 600
python -m soak.fuzz checkpoint --seconds 600
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["base", "soak.targets", "torch._weights_only_unpickler"]):
    from soak.targets import TARGETS, examine


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz what is read.")
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path(), help="folder for inputs that break something")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    file, corpus = folder / "input", folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(TARGETS[arguments.target][1]()):
        (corpus / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        file.write_bytes(data)
        examine(arguments.target, file)

    options = [f"-max_total_time={arguments.seconds}", f"-seed={arguments.seed}", "-print_final_stats=1", "-rss_limit_mb=8000"]
    options += ["-max_len=20000", "-timeout=20", f"-artifact_prefix={arguments.findings}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
