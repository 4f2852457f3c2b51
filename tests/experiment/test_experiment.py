"""A run writes its folder, and continues from it bit for bit."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from base.base_trainer import BaseTrainer
from base.checkpoint import load_checkpoint, save_checkpoint
from base.config import validate
from base.config.same_experiment import config_hash
from base.config.tree import merge
from base.errors import CheckpointError, ConfigError, DataError, Stopped
from base.run_folder.environment import project_version
from experiment.experiment import Experiment, resume
from tiny_runs import config_of, difference, interrupt, read_arrays, run, write_images

pytestmark = pytest.mark.usefixtures("only_few_digits")


def test_a_crash_in_the_first_epoch_can_be_resumed(tmp_path, monkeypatch):
    run(tmp_path / "whole", config_of())

    def crash(self, loss):
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(BaseTrainer, "update", crash)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "crashed", config_of())
    resume(str(tmp_path / "crashed"))
    assert (
        difference(tmp_path / "whole" / "model_last.pth", tmp_path / "crashed" / "model_last.pth")
        == []
    )


def test_fewer_epochs_in_the_middle_of_one_report_the_best_finished_one(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", config_of(trainer={"epochs": 1}))
    interrupt(monkeypatch, tmp_path / "stopped", config_of(), after=5)
    result = resume(str(tmp_path / "stopped"), overrides=[("trainer.epochs", "1")])
    assert result["best_epoch"] == whole["best_epoch"] == 1
    assert result["test_loss"] == whole["test_loss"]
    assert result["last_test_loss"] != whole["test_loss"]


def test_dropout_does_not_depend_on_earlier_draws(tmp_path):
    args = {
        "conv_layer_type": "conv",
        "norm_layer_type": "bn",
        "depth": 10,
        "widen_factor": 1,
        "dropout": 0.3,
    }
    config = config_of(arch={"type": "wide_resnet", "args": args})
    first, second = Experiment.from_config(config), Experiment.from_config(config)
    first.run(str(tmp_path / "a"))
    second.run(str(tmp_path / "b"))
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (
        tmp_path / "b" / "metrics.jsonl"
    ).read_bytes()


def test_the_log_names_the_layer_types_and_warns_once(tmp_path):
    config = config_of(
        arch={"args": {"conv_layer_type": "own_conv", "norm_layer_type": "gn"}},
        trainer={"epochs": 1, "verbosity": 1, "lamb_ocnn": 0.5},
    )
    run(tmp_path / "run", config)
    resume(str(tmp_path / "run"), overrides=[("trainer.epochs", "2")])
    log = (tmp_path / "run" / "info.log").read_text()
    assert log.count("simpleCNN (convolutions own_conv, norm gn) with ") == 2
    assert log.count("without effect in this run: trainer.lamb_ocnn 0.5") == 1


def test_the_comparison_can_fail(tmp_path):
    for seed in (3, 4):
        run(tmp_path / str(seed), config_of(seed=seed))
    different = difference(tmp_path / "3" / "model_last.pth", tmp_path / "4" / "model_last.pth")
    assert any(path.startswith(".state_dict") for path in different)
    assert any(path.startswith(".optimizer") for path in different)


def test_run_folder_holds_everything(tmp_path):
    config = config_of(
        trainer={"sym": True, "percent": 0.5, "tensorboard": True, "save_period": 2, "verbosity": 1}
    )
    result = run(tmp_path / "run", config)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "info.log",
        "environment.json",
        "labels.npz",
        "tensorboard",
        "model_best.pth",
        "model_last.pth",
        "model_epoch_2.pth",
        ".lock",
    }
    read = {path.name: json.loads(path.read_text()) for path in (tmp_path / "run").glob("*.json")}
    # Complete: a checkpoint can be loaded without the data
    filled = {"arch": {"args": {"num_classes": 10, "in_channels": 3}}}
    assert read["config.json"] == merge(config.dump(), filled)
    assert load_checkpoint(tmp_path / "run" / "model_best.pth")["config"] == read["config.json"]
    assert read["result.json"] == result
    assert {
        "test_top1",
        "test_top5",
        "val_top1",
        "best_epoch",
        "epochs",
        "train_seconds",
        "images_per_second",
    } <= result.keys()
    assert {"val_clean_top1", "last_test_top1", "n_train", "n_val", "n_test"} <= result.keys()
    environment = read["environment.json"]
    assert {"packages", "command", "commit", "cpu", "gpus"} <= environment.keys()
    assert result["version"] == environment["version"] == project_version()
    assert result["versions"] == {"python": environment["python"], **environment["packages"]}
    assert (result["commit"] or "").startswith(environment["commit"] or "")
    assert result["config_hash"] == config_hash(validate(read["config.json"]))
    assert "config_hash" not in (tmp_path / "run" / "info.log").read_text()
    labels = read_arrays(tmp_path / "run" / "labels.npz")
    assert result["n_train"] == len(labels["train_index"]) > 3 * 8
    names = {
        f"{part}_{what}" for part in ("train", "val") for what in ("index", "label", "clean_label")
    }
    assert set(labels) == names | {"transition_matrix"}
    kept = [
        (labels["train_label"] == digit)[labels["train_clean_label"] == digit].mean()
        for digit in range(10)
    ]
    assert labels["transition_matrix"].diagonal() == pytest.approx(kept)
    assert not set(labels["train_index"]) & set(labels["val_index"])
    realized = float((labels["train_label"] != labels["train_clean_label"]).mean())
    assert 0.4 < realized < 0.5, "half of the labels drawn from ten classes: 45 % change"
    log = (tmp_path / "run" / "info.log").read_text()
    assert f"train_rate {realized}" in log
    assert f"label noise: 7 -> 7 {kept[7]:.1%}, " in log
    checkpoint = load_checkpoint(tmp_path / "run" / "model_best.pth")
    assert {
        "config",
        "mean",
        "std",
        "class_names",
        "fingerprint",
        "versions",
        "schema_version",
    } <= checkpoint.keys()


def test_result_is_the_best_model_measured_on_the_test_set(tmp_path):
    config = config_of()
    result = run(tmp_path / "run", config)
    experiment = Experiment.from_config(config)
    for name, prefix in (("model_best.pth", ""), ("model_last.pth", "last_")):
        experiment.model.load_state_dict(load_checkpoint(tmp_path / "run" / name)["state_dict"])
        images, labels = (torch.cat(part) for part in zip(*experiment.test_loader, strict=True))
        logits = experiment.model.eval()(images)
        assert result[f"{prefix}test_top1"] == pytest.approx(
            float((logits.argmax(1) == labels).double().mean())
        )
    assert result["n_test"] == len(labels)


def test_averaged_weights_are_validated_and_tested_as_saved(tmp_path):
    attacked = {"method": "fgsm", "validate_every": 0, "report_images": 40}
    config = config_of(
        # With these the four models differ in their accuracies
        seed=6,
        arch={"args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}},
        data_loader={"args": {"num_batches": 20}},
        trainer={"ema_decay": 0.6, "monitor": "min val_top1", "epochs": 2},
        adversarial=attacked,
    )
    result = run(tmp_path / "run", config)
    assert result["best_epoch"] == 1
    experiment = Experiment.from_config(config)
    model = experiment.model.eval()

    def top1(loader):
        images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
        return pytest.approx(float((model(images).argmax(1) == labels).double().mean()))

    log = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    for name, prefix, epoch in (("model_best.pth", "", 0), ("model_last.pth", "last_", 1)):
        saved = load_checkpoint(tmp_path / "run" / name)
        for key, part in (("state_dict", ""), ("ema_state_dict", "ema_")):
            model.load_state_dict(saved[key])
            assert result[f"{prefix}{part}test_top1"] == top1(experiment.test_loader)
            assert log[epoch][f"val_{part}top1"] == top1(experiment.validation_loader)
            kind = name.removeprefix("model_").removesuffix(".pth") + part.rstrip("_").replace(
                "ema", "_ema"
            )
            report = json.loads((tmp_path / "run" / "eval" / f"pgd_{kind}.json").read_text())
            assert report["robust_top1"] == result[f"{prefix}{part}test_robust_top1"]
            assert name in report["checkpoint"]
    pairs = [("", "last_"), ("ema_", "last_ema_"), ("", "ema_"), ("last_", "last_ema_")]
    assert all(result[f"{a}test_top1"] != result[f"{b}test_top1"] for a, b in pairs)
    assert len({result[f"{prefix}test_loss"] for prefix in ("", "last_", "ema_", "last_ema_")}) == 4


def test_a_signal_ends_validation_at_once_and_loses_nothing(tmp_path, monkeypatch):
    config = config_of(trainer={"ema_decay": 0.9})
    run(tmp_path / "whole", config)
    validate = BaseTrainer.validate

    def interrupted(self):
        values = validate(self)
        if self.state.epochs_done == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("validation continued after the signal")
        return values

    with monkeypatch.context() as patched:
        patched.setattr(BaseTrainer, "validate", interrupted)
        with pytest.raises(Stopped, match="stopped by SIGTERM after 1 epoch and 3 batches"):
            run(tmp_path / "stopped", config)
    resume(str(tmp_path / "stopped"))
    assert not difference(
        tmp_path / "stopped" / "model_last.pth", tmp_path / "whole" / "model_last.pth"
    )
    assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


def test_validation_images_are_held_out_if_the_config_needs_them(tmp_path, caplog):
    nothing = {
        "data_loader": {"args": {"validation_split": 0.0}},
        "trainer": {"monitor": "off", "epochs": 1, "verbosity": 1},
    }
    attacked = {"method": "fgsm", "validate_images": 20, "report": False}
    asked = run(
        tmp_path / "asked",
        config_of(**merge(nothing, {"adversarial": {**attacked, "validate_every": 1}})),
    )
    assert asked["n_val"] > 0
    assert "val_robust_top1" in asked
    assert "test_robust_top1" not in asked, "adversarial.report is false"
    assert (
        run(tmp_path / "not", config_of(**merge(nothing, {"adversarial": attacked})))["n_val"] == 0
    )
    assert (
        "no robust validation: nothing is held out" in (tmp_path / "not" / "info.log").read_text()
    )


def test_processes_of_torchrun_must_be_connected(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError,
        match=r"torchrun: the processes are not connected: train inside `with base.distributed.",
    ):
        Experiment.from_config(config_of())


def test_noise_changes_training_and_only_through_labels(tmp_path):
    clean = run(tmp_path / "clean", config_of())
    noisy = run(tmp_path / "noisy", config_of(trainer={"sym": True, "percent": 0.4}))
    assert clean["n_train"] == noisy["n_train"]
    first = {
        name: json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("clean", "noisy")
    }
    assert first["clean"]["loss"] != first["noisy"]["loss"]
    indices = [
        read_arrays(tmp_path / name / "labels.npz")["train_index"] for name in ("clean", "noisy")
    ]
    assert np.array_equal(*indices)


def test_two_runs_of_one_seed_write_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name, config_of())
    for file in ("metrics.jsonl", "labels.npz", "config.json"):
        if file == "labels.npz":
            a, b = (read_arrays(tmp_path / name / file) for name in "ab")
            assert all(np.array_equal(a[key], b[key]) for key in a)
        else:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_val_monitor_without_a_split_holds_out_a_tenth_with_a_warning(tmp_path, caplog):
    without = {"data_loader": {"args": {"validation_split": 0.0}}}
    result = run(tmp_path / "watched", config_of(**without))
    assert "10 % of every class is held out" in caplog.text
    assert "10 % of every class is held out" in (tmp_path / "watched" / "info.log").read_text()
    assert result["n_val"] == 40
    caplog.clear()
    result = run(tmp_path / "off", config_of(**without, trainer={"monitor": "off"}))
    assert (result["n_val"], result["val_top1"], caplog.text) == (0, None, "")


def test_resume_refuses_another_experiment_and_takes_more_epochs(tmp_path):
    run(tmp_path / "run", config_of())
    with pytest.raises(
        ConfigError, match=r"optimizer.args.lr: the run was started with 0.05; 0.1 would make it"
    ):
        resume(str(tmp_path / "run"), overrides=[("optimizer.args.lr", "0.1")])
    with pytest.raises(
        CheckpointError,
        match="another architecture: arch.type is 'simpleCNN' there and 'simpleCNN2' in this",
    ):
        resume(str(tmp_path / "run"), overrides=[("arch.type", "simpleCNN2")])
    run(tmp_path / "cosine", config_of(lr_scheduler={"type": "CosineAnnealingLR"}))
    with pytest.raises(
        ConfigError,
        match=r"trainer.epochs: .* another experiment; CosineAnnealingLR spans the whole run",
    ):
        resume(str(tmp_path / "cosine"), overrides=[("trainer.epochs", "4")])
    with pytest.raises(ConfigError, match=r"system.precision: the run was started with 'fp32'"):
        resume(str(tmp_path / "run"), overrides=[("system.precision", "bf16")])
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = resume(str(tmp_path / "run"), overrides=[("trainer.epochs", "4")])
    assert result["epochs"] == 4
    after = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(after.splitlines()) == 4


def test_a_run_cannot_have_done_fewer_epochs_than_it_has(tmp_path):
    run(tmp_path / "run", config_of(trainer={"epochs": 2}))
    before = {
        path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()
    }
    with pytest.raises(
        ConfigError, match="trainer.epochs: 1, but .*model_last.pth has done 2 epochs already"
    ):
        resume(str(tmp_path / "run"), overrides=[("trainer.epochs", "1")])
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()
    } == before


def test_a_noise_file_may_move_but_not_change(tmp_path, caplog):
    labels = Experiment.from_config(config_of()).train_loader.label_arrays()
    n_images = sum(len(labels[f"{part}_index"]) for part in ("train", "val"))
    clean = np.empty(n_images, np.int64)
    for part in ("train", "val"):
        clean[labels[f"{part}_index"]] = labels[f"{part}_clean_label"]
    noisy = np.where(np.arange(n_images) % 7 == 0, (clean + 1) % 10, clean)
    np.save(tmp_path / "noise.npy", noisy)
    config = config_of(trainer={"noise_file": str(tmp_path / "noise.npy"), "epochs": 1})
    run(tmp_path / "run", config)
    (tmp_path / "noise.npy").rename(tmp_path / "moved.npy")
    overrides = [("trainer.noise_file", str(tmp_path / "moved.npy")), ("trainer.epochs", "2")]
    assert resume(str(tmp_path / "run"), overrides=overrides)["epochs"] == 2
    noisy[::7] = clean[::7]
    noisy[1::7] = (clean[1::7] + 1) % 10
    np.save(tmp_path / "moved.npy", noisy)
    with pytest.raises(
        CheckpointError,
        match=r"data_loader.args.data_dir \(or trainer.noise_file\) now holds: labels$",
    ):
        resume(str(tmp_path / "run"), overrides=[overrides[0]])


def test_other_threads_and_processes_warn(tmp_path, caplog):
    run(tmp_path / "run", config_of(trainer={"epochs": 1}, system={"num_threads": 1}))
    resume(str(tmp_path / "run"), overrides=[("trainer.epochs", "2")])
    assert "resumed with" not in caplog.text
    file = tmp_path / "run" / "environment.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({**before, "resumed": [{"cpu_threads": 5, "processes": 3}]}))
    resume(str(tmp_path / "run"), overrides=[("trainer.epochs", "3")])
    warned = [record.message for record in caplog.records if "resumed with" in record.message]
    reason = "from here on results may differ by rounding"
    assert warned == [
        f"resumed with 1 CPU threads, but the run had 5: {reason}",
        f"resumed with 1 processes, but the run had 3: {reason}",
    ]


def test_resume_refuses_other_data_and_the_originals_checkpoints(tmp_path, monkeypatch):
    run(tmp_path / "run", config_of())
    path = tmp_path / "run" / "model_last.pth"
    contents = load_checkpoint(path)
    save_checkpoint(path, {**contents, "fingerprint": "other"})
    with pytest.raises(CheckpointError, match="was trained on other images or labels"):
        resume(str(path))
    save_checkpoint(path, {**contents, "mean": [0.5, 0.5, 0.5]})
    with pytest.raises(CheckpointError, match="was trained on other images or labels"):
        resume(str(path))
    torch.save(
        {"arch": "CNN", "epoch": 4, "state_dict": {}, "optimizer": {}, "monitor_best": 0.3}, path
    )
    with pytest.raises(CheckpointError, match="holds no config"):
        resume(str(path))


def test_class_counts_must_agree():
    with pytest.raises(
        ConfigError, match=r"arch.args.num_classes: 7, but DigitsDataLoader has 10 classes"
    ):
        Experiment.from_config(config_of(arch={"args": {"num_classes": 7}}))
    with pytest.raises(ConfigError, match=r"^num_classes: 7, but DigitsDataLoader has 10 classes"):
        Experiment.from_config(config_of(num_classes=7))


def test_compiled_model_saves_the_same_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: torch._dynamo.optimize("eager")(function)
    )
    plain, compiled = (
        Experiment.from_config(config_of()),
        Experiment.from_config(config_of(system={"compile": True})),
    )
    compiled.run(str(tmp_path / "run"))
    assert (
        load_checkpoint(tmp_path / "run" / "model_last.pth")["state_dict"].keys()
        == plain.model.state_dict().keys()
    )


def folder_config(folder, split=0.0, **sections):
    args = {"data_dir": str(folder), "batch_size": 6, "validation_split": split}
    loader = {"type": "ImageFolderDataLoader", "args": args}
    plain = {"augmentation": {"crop_padding": 0}, "trainer": {"epochs": 1, "verbosity": 1}}
    return config_of(**merge(merge(plain, {"data_loader": loader}), sections))


def test_the_realized_noise_rate_is_recorded_and_a_surprising_one_warned_of_once(tmp_path, caplog):
    write_images(tmp_path / "set" / "train", {"a": 30, "b": 30})
    write_images(tmp_path / "set" / "test", {"a": 6, "b": 6})
    for law, warned in (("inclusive", 1), ("exclusive", 0)):
        caplog.clear()
        noise = {"sym": True, "percent": 0.5, "noise_law": law, "verbosity": 0}
        result = run(tmp_path / law, folder_config(tmp_path / "set", 0.2, trainer=noise))
        labels = read_arrays(tmp_path / law / "labels.npz")
        assert result["noise_rate"] == np.mean(labels["train_label"] != labels["train_clean_label"])
        assert caplog.text.count("noise_law: exclusive") == warned
        assert caplog.text.count("label noise") == warned
    assert "noise_rate" not in run(tmp_path / "clean", folder_config(tmp_path / "set", 0.2))


def test_a_run_logs_which_images_of_a_folder_it_uses(tmp_path, caplog):
    for part, count in (("train", 8), ("val", 5), ("test", 3)):
        write_images(tmp_path / "set" / part, {"a": count, "b": count, "c": count})
    (tmp_path / "set" / "train" / "a" / "Thumbs.db").touch()
    result = run(tmp_path / "run", folder_config(tmp_path / "set"))
    assert [result[f"n_{part}"] for part in ("train", "val", "test")] == [24, 15, 9]
    log = (tmp_path / "run" / "info.log").read_text()
    assert "data set: val is the validation set\n" in log
    assert "data set: skipped files and folders: 1 of other types (1 '.db')\n" in log
    assert "WARNING" not in log
    run(tmp_path / "split", folder_config(tmp_path / "set", 0.25))
    assert (
        "validation_split: 0.25 has no effect, because the data set names its validation images"
        in caplog.text
    )


def test_a_broken_test_image_that_is_streamed_is_found_before_training(tmp_path):
    write_images(tmp_path / "set" / "train", {"a": 8, "b": 8})
    write_images(tmp_path / "set" / "test", {"a": 3, "b": 3})
    (tmp_path / "set" / "test" / "b" / "002.png").write_bytes(b"\x89PNG\r\n")
    config = folder_config(tmp_path / "set", 0.25, data_loader={"args": {"in_memory": False}})
    with pytest.raises(DataError, match=r"test/b/002\.png: cannot be decoded"):
        Experiment.from_config(config)
