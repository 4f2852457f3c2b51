"""What README.md and the pages of docs/ name exists: commands, flags, configs, paths, modules,
links."""

import ast
import importlib
import re
import shlex
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tiny_runs import script

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "results" / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "tests" / "golden" / "README.md",
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def without_the_past(text):
    """A page without the first column of tables that say how something is done elsewhere, or was
    done before."""
    lines = []
    in_such_a_table = False
    for line in text.splitlines(keepends=True):
        if re.match(r"\| (then|there) \|", line):
            in_such_a_table = True
        elif not line.startswith("|"):
            in_such_a_table = False
        lines.append(re.sub(r"^\| .*? \|", "|", line) if in_such_a_table else line)
    return "".join(lines)


TEXT = {name: without_the_past(page.read_text()) for name, page in zip(NAMES, PAGES, strict=True)}

CONFIG_COMMANDS = ("train.py", "train_robust.py")
FOLDERS = "attacks base benchmarks configs data_loader docs evaluation examples experiment models"
FOLDERS += " reports results studies tests trainer"
# What the letters in commands of results/README.md stand for, as examples
VALUES = {"S": "0", "M": "pgd", "E": "2"}
# What a command of the pages writes
WRITTEN_LATER = {"results/soak.json"}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands_of(name):
    """Every Python command of a page, as words: from its bash blocks and from inline code."""
    lines = []
    for block in blocks(TEXT[name], "bash"):
        lines += block.replace("\\\n", " ").splitlines()
    without_blocks = re.sub(r"^```.*?^```", "", TEXT[name], flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:PYTHONPATH=\S+ )?(?:python|torchrun) [^`]+)`", without_blocks)
    lines += [" ".join(code.split()) for code in inline]
    found = []
    for line in lines:
        for part in re.split(r"\s&&\s", line):
            words = shlex.split(part.replace("$CLONE/", ""), comments=True)
            if "python" in words:
                found.append(words[words.index("python") + 1 :])
            elif "torchrun" in words:
                first = next(place for place, word in enumerate(words) if word.endswith(".py"))
                found.append(words[first:])
    return found


COMMANDS = [(name, words) for name in NAMES for words in commands_of(name)]


@cache
def flags_of(command):
    """The flags that `--help` of a script, or of `-m module`, names."""
    module = command.removeprefix("-m ")
    file = ROOT / command if module == command else module_file(module)
    with tempfile.TemporaryDirectory() as folder:
        # Streams of the process are written beside its working directory
        inner = Path(folder, "inner")
        inner.mkdir()
        done = script(file, "--help", cwd=inner)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", done.stdout))


def module_file(module):
    """The file that `python -m module` runs; None if it is not a module of the clone."""
    path = ROOT.joinpath(*module.split("."))
    candidates = [path.with_suffix(".py"), path / "__main__.py", path / "__init__.py"]
    return next((file for file in candidates if file.is_file()), None)


def split_command(words):
    """The command, a script or `-m module`, and its arguments."""
    if words[0] == "-m":
        return " ".join(words[:2]), words[2:]
    return words[0], words[1:]


def test_the_pages_have_commands():
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("name", NAMES)
def test_every_script_and_module_of_a_command_exists(name):
    for words in commands_of(name):
        command, _ = split_command(words)
        if command.startswith("-m "):
            assert module_file(command.removeprefix("-m ")), f"{name}: {words}"
        elif command.startswith("path/to/clone/"):
            assert (ROOT / command.removeprefix("path/to/clone/")).is_file(), f"{name}: {words}"
        else:
            in_examples = ROOT / "examples" / command
            assert (ROOT / command).is_file() or in_examples.is_file(), f"{name}: {words}"


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_of_a_command_is_in_its_help(name):
    for words in commands_of(name):
        command, arguments = split_command(words)
        given = [word.partition("=")[0] for word in arguments if re.match(r"--?[A-Za-z]", word)]
        known_here = command.startswith("-m ") or (ROOT / command).is_file()
        if given and known_here:
            unknown = set(given) - flags_of(command)
            assert not unknown, f"{name}: {words}: unknown {unknown}"


def config_commands():
    """The commands that train from a shipped config, without the values that stand for any."""
    for name, words in COMMANDS:
        command, arguments = split_command(words)
        if command not in CONFIG_COMMANDS or "-c" not in arguments:
            continue
        config = arguments[arguments.index("-c") + 1]
        if not config.startswith("configs/"):
            continue
        plain = [VALUES.get(word, word) for word in arguments]
        plain = [re.sub(r"(?<==)[SME]$", lambda found: VALUES[found[0]], word) for word in plain]
        yield pytest.param(command, plain, id=f"{name}: {command} {' '.join(arguments)}"[:150])


@pytest.mark.parametrize(("command", "arguments"), list(config_commands()))
def test_every_config_and_key_of_a_training_command_is_accepted(command, arguments, tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    done = script(command, *arguments, "--print-config", cwd=folder)
    assert done.returncode == 0, done.stderr


def grid_commands():
    for name, words in COMMANDS:
        command, arguments = split_command(words)
        if command != "run_ablations.py" or "norms.json" in arguments:
            continue
        if "--launcher" in arguments:
            arguments = arguments[: arguments.index("--launcher")]
        chosen = [word for word in arguments if word not in ("--list", "--all", "--dry-run")]
        yield pytest.param(chosen, id=f"{name}: {' '.join(arguments)}"[:150])


@pytest.mark.parametrize("arguments", list(grid_commands()))
def test_every_grid_of_a_command_can_be_listed(arguments, tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    # Without the flag of a choice, all variants are listed
    show = "--dry-run" if "--config" in arguments else "--list"
    done = script("run_ablations.py", *arguments, show, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_path_in_code_exists(name):
    pattern = rf"(?<![\w./$-])((?:{FOLDERS.replace(' ', '|')})/[\w./*-]*)"
    code = re.findall(r"`([^`\n]+)`", TEXT[name]) + blocks(TEXT[name], "bash")
    for text in code:
        for path in re.findall(pattern, text):
            if path in WRITTEN_LATER:
                continue
            pattern_of_files = path.rstrip("/.")
            beside_the_page = (ROOT / name).parent
            found = [*ROOT.glob(pattern_of_files), *beside_the_page.glob(pattern_of_files)]
            assert found, f"{name}: {path}"


def test_every_new_module_of_the_migration_table_exists():
    table = TEXT["docs/migration.md"].split("### Modules")[1].split("\n##")[0]
    rooms = "attacks|base|evaluation|experiment|models|tests"
    modules = set(re.findall(rf"`((?:{rooms})(?:\.\w+)*)`", table))
    assert len(modules) > 30
    for module in modules:
        assert module_file(module), module


def test_every_new_name_of_the_migration_table_is_defined():
    table = TEXT["docs/migration.md"].split("### Names")[1].split("\n##")[0]
    names = set(re.findall(r"`([A-Za-z_]+)`", table))
    assert len(names) > 10
    rooms = [ROOT / folder for folder in FOLDERS.split() if folder not in ("docs", "tests")]
    code = "".join(file.read_text() for room in rooms for file in room.rglob("*.py"))
    assert names <= set(re.findall(r"^ *(?:class|def) (\w+)", code, re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_an_example_imports_exists(name):
    for block in blocks(TEXT[name], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                # An installation knows the layers as conv_norm, the clone by their folder
                package = node.module.replace("conv_norm", "models.layers.conv_norm")
                module = importlib.import_module(package)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{name}: {node.module}.{alias.name}"


def anchor(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_somewhere(name):
    page = ROOT / name
    for target, fragment in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", TEXT[name]):
        if re.match(r"https?:", target):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{name}: {target}"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{name}: {target}#{fragment}"


def test_every_page_is_linked_from_the_readme_or_from_a_page_that_is():
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached:
            continue
        reached.add(page)
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text()):
            queue.append((page.parent / target).resolve())
    assert set((ROOT / "docs").glob("*.md")) <= reached


def test_the_readme_has_at_most_200_lines():
    assert len(TEXT["README.md"].splitlines()) <= 200


WALK = re.compile(r"\| `([\w/]+\.py)` \| `([\w.]+)` \|")
STOPS = WALK.findall((ROOT / "docs" / "ARCHITECTURE.md").read_text())


def test_the_architecture_has_three_walks():
    assert len(STOPS) > 25


@pytest.mark.parametrize(("file", "name"), STOPS, ids=lambda part: part)
def test_every_function_of_a_walk_stands_in_its_file(file, name):
    node = ast.parse((ROOT / file).read_text())
    for part in name.split("."):
        definitions = [inner for inner in node.body if getattr(inner, "name", None) == part]
        assert definitions, f"{file} has no {name}"
        node = definitions[0]
