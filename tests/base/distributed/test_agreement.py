"""All processes must have the same config, code, data and checkpoint before they begin."""

import json
import shutil

import pytest
import torch

from base.config import validate
from base.config.tree import merge
from base.distributed.agreement import code_digest, config_facts, data_facts, first_difference
from base.errors import CheckpointError, ConfigError, DataError
from base.run_folder.environment import project_version
from data_loader import DATA_LOADERS
from tests.base.distributed.two_processes import ROOT, ended, start_two
from tiny_runs import write_images

SCRIPT = """
import json, sys
from pathlib import Path
import base.distributed.agreement
from experiment.attack_command import attack_network, attack_parser
from base.command_line import run_script
from base.config.files import validate
from base.config.tree import merge
from base.errors import ProjectError
from base.distributed import rank, distributed_session
from experiment.experiment import Experiment

def main():
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[1], "cases.json").read_text())
    reported, digest = {}, base.distributed.agreement.code_digest
    with distributed_session(training=True):
        for name, trees in cases.items():
            if name == "code" and rank() == 1:
                base.distributed.agreement.code_digest = lambda: "other"
            try:
                Experiment.from_config(validate(trees[rank()]))
                reported[name] = [0, ""]
            except ProjectError as error:
                reported[name] = [error.exit_code, str(error)]
            except SystemExit as end:
                reported[name] = [end.code, ""]
            base.distributed.agreement.code_digest = digest
        (folder / f"reported {rank()}.json").write_text(json.dumps(reported))
        words = ["-c", str(folder / "config.json"), "--limit", "10"]
        files = ["--csv", str(folder / "v.csv"), "--json", str(folder / "r.json")]
        if rank() == 1:
            files = []
        attack = attack_parser("", ()).parse_args(["-s", str(folder / "0.pth"), *words, *files])
        attack_network(attack, "fgsm")
        attack = attack_parser("", ()).parse_args(["-s", str(folder / f"{rank()}.pth"), *words])
        attack_network(attack, "fgsm")

run_script(main)
"""


def tree_of(folder, **sections):
    args = {"data_dir": str(folder), "batch_size": 4}
    images = {
        "data_loader": {"type": "ImageFolderDataLoader", "args": args},
        "arch": {"type": "simpleCNN"},
    }
    return merge(
        images,
        {
            "system": {"num_threads": 1, "device": "cpu"},
            "trainer": {"epochs": 1, "monitor": "off"},
            **sections,
        },
    )


def write_data(folder):
    for part, count in (("train", 5), ("test", 2)):
        write_images(folder / part, {"ape": count, "bee": count, "cow": count})
    return folder


def changed(folder, name, change):
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def test_any_difference_is_one_line_and_the_exit_code_of_all(tmp_path):
    data = write_data(tmp_path / "data")

    def other_pixels(part):
        return lambda copy: shutil.copy(
            copy / part / "bee" / "001.png", copy / part / "bee" / "000.png"
        )

    copies = {
        "training pixels": changed(data, "1", other_pixels("train")),
        "test pixels": changed(data, "2", other_pixels("test")),
        "classes": changed(
            data,
            "3",
            lambda copy: [(copy / p / "cow").rename(copy / p / "dog") for p in ("train", "test")],
        ),
        "counts": changed(data, "4", lambda copy: (copy / "test" / "ape" / "001.png").unlink()),
        "missing": tmp_path / "nowhere",
        "moved": changed(data, "5", lambda copy: None),
    }
    cases = {name: [tree_of(data), tree_of(copy)] for name, copy in copies.items()}
    streamed = {"data_loader": {"args": {"in_memory": False}}}
    cases["files"] = [merge(tree, streamed) for tree in cases["training pixels"]]
    broken = changed(data, "6", lambda copy: (copy / "test" / "bee" / "000.png").write_bytes(b""))
    cases["broken streamed"] = [merge(tree_of(broken), streamed)] * 2
    cases["config"] = [
        tree_of(data),
        tree_of(data, optimizer={"type": "SGD", "args": {"lr": 0.25}}),
    ]
    cases["code"] = [tree_of(data), tree_of(data)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    original = ROOT / "tests" / "golden" / "original_checkpoint_prec_conv" / "model_best.pth"
    checkpoint = torch.load(original, weights_only=True)
    torch.save(checkpoint, tmp_path / "0.pth")
    next(iter(checkpoint["state_dict"].values())).add_(1e-3)
    torch.save(checkpoint, tmp_path / "1.pth")
    arch = {"type": "simpleCNN", "args": {"norm_layer_type": "no", "conv_layer_type": "prec_conv"}}
    config = {
        "arch": arch,
        "data_loader": {"type": "DigitsDataLoader"},
        "system": {"num_threads": 1, "device": "cpu"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "script.py").write_text(SCRIPT)

    codes, errors = ended(start_two(tmp_path / "script.py", tmp_path))
    reported = [
        json.loads((tmp_path / f"reported {number}.json").read_text()) for number in range(2)
    ]
    expected = {
        "training pixels": (4, "rank 1 and rank 0 have different training images"),
        "test pixels": (4, "rank 1 and rank 0 have different test images"),
        "classes": (
            4,
            "class names of the training images: ['ape', 'bee', 'dog'] on rank 1"
            " and ['ape', 'bee', 'cow']",
        ),
        "counts": (4, "different numbers of test images: 5 on rank 1 and 6 on rank 0"),
        "missing": (4, f"rank 1: data_loader.args.data_dir: '{tmp_path / 'nowhere'}' is"),
        "moved": (0, ""),
        "files": (4, "rank 1 and rank 0 have different training images"),
        "broken streamed": (4, f"{broken}/test/bee/000.png: cannot be decoded"),
        "config": (2, "different config: optimizer.args.lr is 0.25 on rank 1 and 0.1 on rank 0"),
        "code": (2, "rank 1 and rank 0 have different code"),
    }
    assert {name: code for name, (code, _) in reported[0].items()} == {
        name: code for name, (code, _) in expected.items()
    }
    assert reported[1] == {name: [code, ""] for name, (code, _) in expected.items()}, (
        "only rank 0 reports the error, but all end with its code"
    )
    for name, (_, message) in expected.items():
        assert message in reported[0][name][1], name
        assert "\n" not in reported[0][name][1]
    assert len((tmp_path / "v.csv").read_text().splitlines()) == 11, "rank 0 alone asks for files"
    assert json.loads((tmp_path / "r.json").read_text())["n"] == 10
    assert codes == [3, 3], errors
    assert errors[0].splitlines()[-1] == "error: rank 1 and rank 0 have different checkpoints"
    assert "different" not in errors[1]


def digits(**args):
    return DATA_LOADERS["DigitsDataLoader"](batch_size=16, **args).test_loader()


def test_the_first_difference_is_reported():
    tree = {"arch": {"type": "simpleCNN"}, "data_loader": {"type": "DigitsDataLoader"}, "seed": 2}
    facts = config_facts(validate(tree))
    others = {"name": "other", "trainer": {"save_dir": "elsewhere"}, "system": {"num_threads": 3}}
    assert first_difference([facts, config_facts(validate(merge(tree, others))), facts]) is None
    error = first_difference(
        [facts, facts, config_facts(validate(merge(tree, {"seed": 5}))), facts]
    )
    assert isinstance(error, ConfigError)
    assert (
        str(error) == "rank 2 and rank 0 have different config: seed is 5 on rank 2 and 2 on rank 0"
    )
    one, other = (
        data_facts(test=digits()),
        data_facts(test=digits(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))),
    )
    assert isinstance(first_difference([one, other]), DataError)
    assert (
        "ranks 1, 2 and rank 0 have different mean of the test images: [0.5, 0.5, 0.5] on rank 1"
        in str(first_difference([one, other, other]))
    )
    few = data_facts(test=digits().subset(torch.arange(7)))
    assert "numbers of test images: 7 on rank 1" in str(first_difference([one, few]))
    both = first_difference(
        [{"a": (CheckpointError, "x"), **one}, {"a": (CheckpointError, "y"), **few}]
    )
    assert isinstance(both, CheckpointError)


def test_an_installed_project_is_compared_by_its_version(tmp_path, monkeypatch):
    (tmp_path / "others.py").write_text("")
    monkeypatch.setattr("base.distributed.agreement.ROOT", tmp_path)
    assert code_digest() == f"version {project_version()}"


@pytest.mark.parametrize("limit", [3, 2**31])
def test_digests_of_files_see_sizes_and_contents(tmp_path, monkeypatch, limit):
    monkeypatch.setattr("data_loader.images.FINGERPRINT_BYTES", limit)
    write_data(tmp_path / "data")

    def digest():
        args = {"data_dir": tmp_path / "data", "batch_size": 4}
        return (
            DATA_LOADERS["ImageFolderDataLoader"](**args, in_memory=False)
            .test_loader()
            .image_digest()
        )

    before = digest()
    assert digest() == before
    first = sorted((tmp_path / "data" / "test").rglob("*.png"))[0]
    first.write_bytes(first.read_bytes() + b"\0")
    assert digest() != before
