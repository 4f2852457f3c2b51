"""A user's own code: Python files and modules that put entries into the tables of `base.registry`.

A config names them under `imports`, a command line by `--imports`. Code runs only if a config that
is given by `-c`, a parent of that config, or the flag names it. What a checkpoint or a run folder
asks for is compared with what this process has imported already, and is never imported for it.
"""

import hashlib
import importlib
import inspect
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.abc import SourceLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from base import registry
from base.config.section import FilePath, Section
from base.errors import CheckpointError, ConfigError, ProjectError
from base.rooms import ROOMS, ROOT
from base.text import one_line

FLAG = "--imports"
EXPECTED = "expected a list of Python files and names of modules"


class OwnCode(Section):
    """A file or module of a user's own, as a resolved config names it."""

    file: FilePath | None = None
    """Path of a Python file; absolute in a resolved config."""
    module: Annotated[str, Field(min_length=1)] | None = None
    """Name of a module that Python finds, such as my_package.losses."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Digest of the file that was run; written by a run, to tell whether the code has changed."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.file is None) == (self.module is None):
            raise ValueError("expected either file or module")
        return self

    @property
    def name(self) -> str:
        """The module's name; a file is the module of its stem."""
        return self.module or Path(self.file or "").stem

    @property
    def word(self) -> str:
        """What `--imports` takes for it."""
        return self.module or self.file or ""


def _from_word(value: object) -> object:
    if not isinstance(value, str):
        return value
    is_file = value.endswith(".py") or "/" in value or os.sep in value
    return {"file" if is_file else "module": value}


Import = Annotated[OwnCode, BeforeValidator(_from_word, json_schema_input_type=str | OwnCode)]
"""An entry of `imports`: a word, as people write it, or an object, as a resolved config has it."""
LIST_OF_IMPORTS: TypeAdapter[list[OwnCode]] = TypeAdapter(list[Import])


@dataclass(frozen=True)
class Request:
    """Code that a config or a flag asks for.

    Attributes:
        code: what to import.
        source: what errors begin with: `my.json: imports`, or `--imports`.
        folder: what its path is relative to.
    """

    code: OwnCode
    source: str
    folder: Path


_imported: dict[str, OwnCode] = {}
"""Everything that this process has imported: name of the module -> what it came from."""
_owners: dict[tuple[str, str], str] = {}
"""Table and entry -> the file or module of a user's own that registered it."""


def requests_of(value: Any, source: str, folder: Path) -> list[Request]:
    """What an `imports` value asks for.

    Args:
        value: of the key `imports`, or the words of `--imports`.
        source: see `Request`.
        folder: what paths are relative to.

    Raises:
        ConfigError: it is not a list of files and modules.
    """
    try:
        codes = LIST_OF_IMPORTS.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f"{part}: " for part in problem["loc"][:1])
        what = f": {problem['ctx']['error']}" if problem["type"] == "value_error" else ""
        raise ConfigError(f"{source}: {place}{EXPECTED}{what}") from None
    return [Request(code, source, folder) for code in codes]


def requests_of_flag(words: Iterable[str | os.PathLike[str]]) -> list[Request]:
    """What the words of `--imports` ask for; their paths are relative to the working directory.

    Raises:
        ConfigError: a word is empty.
    """
    return requests_of([os.fspath(word) for word in words], FLAG, Path.cwd())


def import_own_code(requests: Iterable[Request]) -> list[OwnCode]:
    """Import what is asked for, each file and module once in a process.

    Returns:
        What was imported, with absolute paths and digests, each module once.

    Raises:
        ConfigError: one line that names the source, the file or module, and the line of its code.
    """
    found: dict[str, OwnCode] = {}
    for request in requests:
        code = _import(request)
        found[code.name] = code
    return list(found.values())


def imported_for(recorded: Iterable[OwnCode], source: str) -> list[OwnCode]:
    """What this process has imported of the code that a checkpoint or a run folder asks for.
    Nothing is imported.

    Args:
        recorded: what the config of the checkpoint names.
        source: the checkpoint.

    Raises:
        CheckpointError: some of it has not been imported; the message shows the flags to give.
    """
    recorded = list(recorded)
    missing = [code for code in recorded if code.name not in sys.modules]
    if missing:
        flags = " ".join(f"{FLAG} {shlex.quote(code.word)}" for code in missing)
        gone = [code.word for code in missing if code.file and not Path(code.file).is_file()]
        moved = f" (no longer there: {', '.join(gone)}; give its new path)" if gone else ""
        raise CheckpointError(
            f"{source}: needs code of a user's own, which only a flag or -c can run:"
            f" add {one_line(flags, 400)}{moved}"
        )
    return [_imported.get(code.name) or _already_there(code) for code in recorded]


def changes(recorded: Iterable[OwnCode], now: Iterable[OwnCode]) -> list[str]:
    """A warning for each file whose content is not what a run recorded."""
    before = {code.name: code for code in recorded if code.sha256 is not None}
    return [
        f"imports: {code.word}: has other content than when the run began"
        for code in now
        if code.name in before and code.sha256 != before[code.name].sha256
    ]


def is_imported(module: str) -> bool:
    """Whether a module belongs to what was imported: it, or its package."""
    package = module.partition(".")[0]
    return any(name.partition(".")[0] == package for name in _imported)


def own_class(name: str, kind: type, key: str) -> type:
    """The class that a dotted name stands for, such as `my_module.Lion`, in what was imported.

    Args:
        name: module and class.
        kind: what it has to be a subclass of.
        key: the config key of the name.

    Raises:
        ConfigError: the module was not imported, or holds no such class.
    """
    module, _, short = name.rpartition(".")
    shown = repr(one_line(name, 80))
    if module not in sys.modules or not is_imported(module):
        raise ConfigError(
            f"{key}: {shown}: the module {one_line(module, 80)} is not among the imports"
        )
    found = vars(sys.modules[module])
    cls = found.get(short)
    if not inspect.isclass(cls) or not issubclass(cls, kind):
        known = [other for other in found if inspect.isclass(found[other])]
        what = f"expected a subclass of {kind.__name__} in {module}"
        raise ConfigError(f"{key}: {shown}: {what}{registry.did_you_mean(short, known)}")
    return cls


def _import(request: Request) -> OwnCode:
    code = request.code
    if code.file is None:
        return _import_module(request)
    file = Path(os.path.abspath(request.folder / os.path.expanduser(code.file)))  # noqa: PTH100, PTH111
    known = _imported.get(file.stem)
    if known is not None:
        if known.file is not None and Path(known.file).resolve() == file.resolve():
            return known
        raise _error(request, f"{known.word} is the module {file.stem} already: rename one of them")
    return _import_file(request, file)


def _import_file(request: Request, file: Path) -> OwnCode:
    name = file.stem
    try:
        source = file.read_bytes()
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise _error(request, f"{what} (looked for {file})") from None
    if "." in name:
        raise _error(request, f"{name!r} cannot be the name of a module: rename the file")
    digest = hashlib.sha256(source).hexdigest()
    code = OwnCode(file=str(file), sha256=digest)
    loaded = sys.modules.get(name)
    if loaded is not None and _file_of(loaded) == file.resolve():
        # a user's program has imported it itself
        return _noted(code)
    hidden = _hidden_by(name, file)
    if hidden is not None:
        raise _error(request, f"would hide {hidden}: rename the file")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))

    def run() -> None:
        spec = spec_from_file_location(name, file, loader=_Source(file, source))
        assert spec is not None and spec.loader is not None, "a loader was given"  # noqa: S101, PT018
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])

    _run(request, code, file, run)
    return _noted(code)


def _import_module(request: Request) -> OwnCode:
    name = request.code.module or ""
    known = _imported.get(name)
    if known is not None:
        return known
    if name.partition(".")[0] in ROOMS:
        raise _error(request, "is a room of this project: expected a module of your own")
    _run(request, request.code, None, lambda: importlib.import_module(name))
    return _noted(_already_there(OwnCode(module=name)))


def _noted(code: OwnCode) -> OwnCode:
    _imported[code.name] = code
    return code


def _already_there(code: OwnCode) -> OwnCode:
    """The code with the digest of the file that its module, which is loaded, has now."""
    file = _file_of(sys.modules[code.name])
    digest = None
    if file is not None and file.is_file():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if code.file is not None and file is not None:
        return OwnCode(file=str(file), sha256=digest)
    return OwnCode(file=code.file, module=code.module, sha256=digest)


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()


def _hidden_by(name: str, file: Path) -> str | None:
    """What a module of this name stands for already; None where that is nothing, or this file."""
    if name in ROOMS or (ROOT / f"{name}.py").is_file():
        return f"{name} of this project"
    loaded = sys.modules.get(name)
    if loaded is not None:
        return f"the module {name} ({_file_of(loaded) or 'built in'})"
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or Path(spec.origin).resolve() == file.resolve():
        return None
    return f"the module {name} ({spec.origin})"


class _Source(SourceLoader):
    """Runs the bytes that the digest was made of, not what the file or a cache holds a moment
    later."""

    def __init__(self, file: Path, source: bytes) -> None:
        self.file, self.source = file, source

    def get_filename(self, fullname: str) -> str:
        return str(self.file)

    def get_data(self, path: str | bytes) -> bytes:
        return self.source


def _run(request: Request, code: OwnCode, file: Path | None, run: Callable[[], object]) -> None:
    """Run the code; where it fails, or replaces an entry, the tables are as they were before."""
    before = {name: dict(table) for name, table in tables().items()}
    modules = set(sys.modules)
    try:
        run()
        problem = _problem_with_tables(before)
        if problem is not None:
            raise _error(request, problem)
    except BaseException as error:
        for name, table in tables().items():
            table.clear()
            table.update(before[name])
        if code.name not in modules:
            sys.modules.pop(code.name, None)
        if isinstance(error, ProjectError) or not isinstance(error, Exception | SystemExit):
            raise
        raise _error(request, _reason(error, code, file)) from error
    for name, table in tables().items():
        for entry in table.keys() - before[name].keys():
            _owners[name, entry] = code.word


def tables() -> dict[str, dict[Any, Any]]:
    """The tables of `base.registry` by their names."""
    return {
        name: table
        for name, table in vars(registry).items()
        if name.isupper() and isinstance(table, dict)
    }


def _problem_with_tables(before: Mapping[str, Mapping[Any, Any]]) -> str | None:
    """What is wrong with what was done to the tables; None where entries were only added."""
    for name, table in tables().items():
        for entry, old in before[name].items():
            if table.get(entry) is not old:
                what = "replaces" if entry in table else "removes"
                owner = _owners.get((name, entry)) or _home(old)
                return f"{what} {name}[{entry!r}] of {owner}: choose another name"
        for entry in table.keys() - before[name].keys():
            if not isinstance(entry, str) or not callable(table[entry]):
                return f"{name}[{entry!r}]: expected a name, and a class or function for it"
            try:
                inspect.signature(table[entry])
            except (TypeError, ValueError):
                return f"{name}[{entry!r}]: has no signature to read its arguments from; wrap it in a function"
    return None


def _home(entry: Any) -> str:
    """The file in which an entry of a table is defined."""
    entry = getattr(entry, "func", entry)
    try:
        file = Path(inspect.getsourcefile(entry) or "")
    except TypeError:
        return "this project"
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


def _error(request: Request, problem: str) -> ConfigError:
    return ConfigError(
        f"{request.source}: {one_line(request.code.word, 200)}: {one_line(problem, 400)}"
    )


def _reason(error: BaseException, code: OwnCode, file: Path | None) -> str:
    """Line, kind and message of an error that the code has raised."""
    if isinstance(error, SyntaxError):
        where = "" if error.filename in (None, str(file)) else f"{error.filename}, "
        return f"{where}line {error.lineno}: {type(error).__name__}: {error.msg}"
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if file is None and missing and f"{code.name}.".startswith(f"{missing}."):
        return "no such module; a folder of modules is searched if PYTHONPATH names it"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if file is not None and frame.filename == str(file)
    ]
    place = f"line {lines[-1]}: " if lines else ""
    room = missing.partition(".")[0]
    hint = f"; {room} is a room of this project, which comes first" if room in ROOMS else ""
    return f"{place}{type(error).__name__}: {error}{hint}"
