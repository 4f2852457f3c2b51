"""A user's own code: which code runs, and the errors for code that cannot run."""

import json
import multiprocessing
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import experiment  # noqa: F401 - fills the tables
from base.config import imports, load_config
from base.config.imports import (
    FLAG,
    OwnCode,
    import_own_code,
    imported_for,
    own_class,
    requests_of_flag,
)
from base.config.same_experiment import config_hash
from base.errors import CheckpointError, ConfigError
from base.registry import METRICS, NORM_LAYERS

pytestmark = pytest.mark.usefixtures("own_code")
OWN = "OWN = True\n"
REGISTERS = (
    f"{OWN}from base.registry import NORM_LAYERS\nNORM_LAYERS['frn'] = lambda channels: None\n"
)


def own(*names):
    return import_own_code(requests_of_flag(names))


def config_file(path, **tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data_loader": {"type": "DigitsDataLoader"}, **tree}))
    return path


def test_a_file_runs_once_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "once_only.py").write_text(f"{REGISTERS}import os\nos.mkdir('ran')\n")
    (tmp_path / "link").symlink_to(tmp_path)
    names = ["once_only.py", "./once_only.py", tmp_path / "once_only.py", "link/once_only.py"]
    (code,) = own(*names)
    assert own(*names) == [code]
    assert (code.file, code.name) == (str(tmp_path / "once_only.py"), "once_only")
    assert "frn" in NORM_LAYERS
    assert sys.path[-1] == str(tmp_path), "after the clone, which it must not hide"


def test_a_file_in_the_clone_itself_can_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(imports, "ROOT", tmp_path)
    (tmp_path / "beside_commands.py").write_text(REGISTERS)
    (code,) = own(tmp_path / "beside_commands.py")
    assert code.name == "beside_commands"
    assert "frn" in NORM_LAYERS


def test_files_of_parents_come_first_and_null_deletes_them(tmp_path):
    for name in ("first_one", "second_one", "third_one"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(OWN)
    config_file(tmp_path / "first_one" / "a.json", imports=["first_one.py"], _imports=["no.py"])
    second = config_file(
        tmp_path / "second_one" / "b.json", extends="../first_one/a.json", imports=["second_one.py"]
    )
    third = config_file(tmp_path / "c.json", extends="second_one/b.json", imports=None)

    def names(path, *flags):
        return [code.name for code in load_config(path, imports=flags).imports]

    assert names(third) == []
    assert "first_one" not in sys.modules
    by_flag = load_config(third, imports=[tmp_path / "third_one" / "third_one.py"])
    assert by_flag.origins["imports",] == FLAG, "not the files whose imports are deleted"
    assert names(second) == ["first_one", "second_one"]
    assert names(second, tmp_path / "third_one" / "third_one.py") == [
        "first_one",
        "second_one",
        "third_one",
    ]
    again = tmp_path / "again.json"
    again.write_text(json.dumps(load_config(second).dump()))
    assert load_config(again) == load_config(second), "a resolved config can be given again"


def test_a_resolved_config_whose_file_has_changed_warns(tmp_path):
    (tmp_path / "changing.py").write_text(REGISTERS)
    resolved = load_config(config_file(tmp_path / "a.json", imports=["changing.py"])).dump()
    resolved["imports"][0]["sha256"] = "0" * 64
    (warning,) = load_config(config_file(tmp_path / "b.json", **resolved)).warnings
    assert warning == f"imports: {tmp_path / 'changing.py'}: has changed since the run started"


BROKEN = {
    "syntax.py": ("x = 1\ndef (:\n", r"line 2: SyntaxError: invalid syntax"),
    "raises.py": ("\n\nraise KeyError('no')\n", r"line 3: KeyError: 'no'"),
    "leaves.py": ("import sys\nsys.exit(3)\n", r"line 2: SystemExit: 3"),
    "ends.py": ("raise BaseException('x')\n", r"line 1: BaseException: x"),
    "generates.py": ("raise GeneratorExit\n", r"line 1: GeneratorExit"),
    "null_bytes.py": ("\0", r"SyntaxError: source code string cannot contain null bytes"),
    "lacks.py": (
        "import no_such_thing\n",
        r"line 1: ModuleNotFoundError: No module named 'no_such_thing'",
    ),
    "meets_a_room.py": (
        "import models.frn\n",
        r"line 1: ModuleNotFoundError: No module named 'models.frn';"
        " models is a room of this project, which comes first",
    ),
    "replaces.py": (
        "from base.registry import NORM_LAYERS\nNORM_LAYERS['bn'] = print\n",
        r"replaces NORM_LAYERS\['bn'\] of .*: choose another name",
    ),
    "removes.py": (
        "from base.registry import METRICS\ndel METRICS['top1']\n",
        r"removes METRICS\['top1'\] of models/metrics.py: choose another name",
    ),
    "wrong_kind.py": (
        "from base.registry import METRICS\nMETRICS['mine'] = 3\n",
        r"METRICS\['mine'\]: expected a name, and a class or function for it",
    ),
    "builtin.py": (
        "from base.registry import NORM_LAYERS\nNORM_LAYERS['mine'] = dict\n",
        r"NORM_LAYERS\['mine'\]: Python cannot tell its arguments;"
        " wrap it in a function that names them",
    ),
    "models.py": ("", "would hide models of this project: rename the file"),
    "train.py": ("", "would hide train of this project: rename the file"),
    "json.py": ("", r"would hide the module json \(.*json/__init__.py\): rename the file"),
    "a.b.py": ("", "'a.b' cannot be the name of a module: rename the file"),
    "missing.py": (None, r"no such file \(looked for .*/missing.py\)"),
    "folder.py": (
        "/",
        r"is a folder: expected a Python file, or the name of a module"
        r" \(looked for .*/folder.py\)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_code_that_cannot_run_is_one_line_and_leaves_nothing(tmp_path, name):
    code, message = BROKEN[name]
    if code == "/":
        (tmp_path / name).mkdir()
    elif code is not None:
        (tmp_path / name).write_text(code)
    config = config_file(tmp_path / "c.json", imports=[name])
    before = {table: dict(entries) for table, entries in imports.tables().items()}
    for call, source in (
        (lambda: load_config(config), f"{config}: imports"),
        (lambda: own(tmp_path / name), FLAG),
    ):
        with pytest.raises(ConfigError, match=rf"^{source}: \S*{name}: {message}$"):
            call()
    assert imports.tables() == before
    if name in ("syntax.py", "raises.py", "replaces.py"):
        (tmp_path / name).write_text(REGISTERS)
        assert own(tmp_path / name), "once it is fixed it runs"


@pytest.mark.parametrize("name", ["..", ".", "my_package..losses"])
def test_a_word_that_is_neither_a_file_nor_a_module_is_an_error(name):
    with pytest.raises(ConfigError, match=rf"^{FLAG}: {re.escape(name)}: expected a Python file, "):
        own(name)


def test_what_code_changes_of_the_process_is_restored_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    text = (
        f"{OWN}import os, torch\nos.chdir('elsewhere')\ntorch.set_default_dtype(torch.float64)\n"
        "torch.set_default_device('meta')\ntorch.set_grad_enabled(False)\n"
    )
    (tmp_path / "changes_all.py").write_text(text)
    (tmp_path / "changes_and_fails.py").write_text(f"{text}1 / 0\n")
    own("changes_all.py")
    with pytest.raises(ConfigError, match="line 7: ZeroDivisionError"):
        own("changes_and_fails.py")
    assert Path.cwd() == tmp_path
    assert torch.ones(1).dtype == torch.float32
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.is_grad_enabled()
    assert caplog.messages == [
        f"{FLAG}: changes_all.py: changed the working directory, torch's default dtype, torch's"
        " default device, torch's grad mode; restored, because the whole process shares such"
        " settings"
    ]


def test_an_entry_that_two_files_register_names_both(tmp_path):
    for name in ("one_frn", "other_frn"):
        (tmp_path / f"{name}.py").write_text(REGISTERS)
    own(tmp_path / "one_frn.py")
    with pytest.raises(ConfigError) as caught:
        own(tmp_path / "other_frn.py")
    one, other = tmp_path / "one_frn.py", tmp_path / "other_frn.py"
    assert (
        str(caught.value)
        == f"{FLAG}: {other}: replaces NORM_LAYERS['frn'] of {one}: choose another name"
    )


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(OWN)
    own(tmp_path / "a" / "same_name.py")
    with pytest.raises(
        ConfigError, match=r"b/same_name.py: .*a/same_name.py is already the module same_name"
    ):
        own(tmp_path / "b" / "same_name.py")


def test_modules_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "losses.py").write_text(OWN)
    with pytest.raises(
        ConfigError, match=r"^--imports: my_package.losses: no such module; .* PYTHONPATH"
    ):
        own("my_package.losses")
    monkeypatch.syspath_prepend(tmp_path)
    (code,) = own("my_package.losses")
    assert code.module == "my_package.losses"
    assert code.sha256 is not None
    with pytest.raises(ConfigError, match=r"^--imports: models.losses: is a room of this project"):
        own("models.losses")


@pytest.mark.parametrize(
    "value", ["my.py", [3], [{"file": "a.py", "module": "a"}], [{}], [""], {"file": "a.py"}]
)
def test_imports_that_are_not_a_list_of_texts_are_an_error(tmp_path, value):
    with pytest.raises(
        ConfigError,
        match=r"c.json: imports: .*expected a list of Python files and names of modules",
    ):
        load_config(config_file(tmp_path / "c.json", imports=value))


def test_set_cannot_import_code(tmp_path):
    (tmp_path / "own_file.py").write_text("raise AssertionError")
    with pytest.raises(
        ConfigError, match=r"^--set imports=.*: your own code is named by --imports FILE_OR_MODULE$"
    ):
        load_config(
            config_file(tmp_path / "c.json"),
            [("imports", json.dumps([str(tmp_path / "own_file.py")]))],
        )


def test_code_that_a_checkpoint_needs_is_not_run(tmp_path):
    file = tmp_path / "it's asked.py"
    file.write_text("raise AssertionError")
    with pytest.raises(CheckpointError) as caught:
        imported_for([OwnCode(file=str(file)), OwnCode(file="/gone/away_now.py")], "run")
    assert "add --imports '/" in str(caught.value)
    assert (
        "asked.py' --imports /gone/away_now.py"
        " (no longer there: /gone/away_now.py; give its new path)" in str(caught.value)
    )


def test_only_classes_of_imported_modules_can_be_named(tmp_path):
    (tmp_path / "own_classes.py").write_text(f"{OWN}class Lion(dict): pass\n")
    with pytest.raises(
        ConfigError, match="'own_classes.Lion': the module own_classes is not among the imports"
    ):
        own_class("own_classes.Lion", dict, "optimizer.type")
    with pytest.raises(ConfigError, match="the module collections is not among the imports"):
        own_class("collections.OrderedDict", dict, "optimizer.type")
    own(tmp_path / "own_classes.py")
    assert issubclass(own_class("own_classes.Lion", dict, "optimizer.type"), dict)
    with pytest.raises(
        ConfigError, match="expected a subclass of dict in own_classes; did you mean 'Lion'"
    ):
        own_class("own_classes.Lino", dict, "optimizer.type")


def test_a_run_depends_on_its_code_and_not_on_the_path(tmp_path, monkeypatch):
    def hashes(folder, text):
        monkeypatch.setattr(imports, "_imported", {})
        sys.modules.pop("my_code", None)
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "my_code.py").write_text(OWN + text)
        config = load_config(config_file(tmp_path / folder / "c.json", imports=["my_code.py"]))
        shutil.rmtree(tmp_path / folder)
        sys.path_importer_cache.clear()
        return config_hash(config)

    first, moved, other = hashes("a", ""), hashes("b", ""), hashes("c", "x = 1\n")
    assert first == moved
    assert first != other
    without = load_config(config_file(tmp_path / "c.json"))
    assert config_hash(without) not in {first, other}


def test_worker_processes_find_the_modules_that_they_unpickle(tmp_path):
    text = (
        f"{OWN}from base.registry import METRICS\nimport os\n"
        "def tell(queue): queue.put(os.getpid())\n"
    )
    (tmp_path / "own_worker.py").write_text(f"{text}METRICS['own_metric'] = tell\n")
    own(tmp_path / "own_worker.py")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=METRICS["own_metric"], args=(queue,))
    worker.start()
    assert queue.get(timeout=60) == worker.pid
    worker.join()
