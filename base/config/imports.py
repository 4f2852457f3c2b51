"""A user's own code: Python files and modules that add entries to the tables of `base.registry`.

A config names them under `imports`, a command line by `--imports`. Code runs only if it is named by
the flag, by a config that is given by `-c`, or by a parent of that config. A checkpoint or a run
folder never causes an import: the code that it needs must have been imported already.
"""

import hashlib
import importlib
import inspect
import logging
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
from base.config.surroundings import surroundings_kept
from base.errors import CheckpointError, ConfigError, ProjectError
from base.rooms import ROOMS, ROOT
from base.text import one_line

logger = logging.getLogger(__name__)

FLAG = "--imports"


class OwnCode(Section):
    """A user's own file or module, as a resolved config names it."""

    file: FilePath | None = None
    """Path of a Python file; absolute in a resolved config."""
    module: Annotated[str, Field(min_length=1)] | None = None
    """Name of a module that Python finds, such as my_package.losses."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Digest of the file. A run writes it, so that a resume can tell if the code has changed."""

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if (self.file is None) == (self.module is None):
            raise ValueError("expected either file or module")
        return self

    @property
    def name(self) -> str:
        """The name of the module; a file is the module of its stem."""
        return self.module or Path(self.file or "").stem

    @property
    def file_or_module(self) -> str:
        """The text by which `--imports` names it."""
        return self.module or self.file or ""


def _parse_import(value: object) -> object:
    if not isinstance(value, str):
        return value
    # os.sep is a backslash on Windows
    if value.endswith(".py") or "/" in value or os.sep in value:
        return {"file": value}
    return {"module": value}


Import = Annotated[OwnCode, BeforeValidator(_parse_import, json_schema_input_type=str | OwnCode)]
"""An entry of `imports`: a text, as people write it, or an object, as in a resolved config."""
LIST_OF_IMPORTS: TypeAdapter[list[OwnCode]] = TypeAdapter(list[Import])


@dataclass(frozen=True)
class Request:
    """Code that a config or a flag asks to import.

    Attributes:
        code: the file or module.
        source: the beginning of errors: `my.json: imports`, or `--imports`.
        folder: the folder to which its path is relative.
    """

    code: OwnCode
    source: str
    folder: Path


_imported: dict[str, OwnCode] = {}
"""The code that this process has imported, by the names of its modules."""
_owners: dict[tuple[str, str], str] = {}
"""Table and entry -> the user's own file or module that registered it."""


def requests_of(value: Any, source: str, folder: Path) -> list[Request]:
    """Return the requests of an `imports` value.

    Args:
        value: the value of the key `imports`, or the arguments of `--imports`.
        source: see `Request`.
        folder: the folder to which paths are relative.

    Raises:
        ConfigError: the value is not a list of files and modules.
    """
    try:
        codes = LIST_OF_IMPORTS.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        index = "".join(f"{part}: " for part in problem["loc"][:1])
        reason = ""
        if problem["type"] == "value_error":
            reason = f": {problem['ctx']['error']}"
        raise ConfigError(
            f"{source}: {index}expected a list of Python files and names of modules{reason}"
        ) from None
    return [Request(code, source, folder) for code in codes]


def requests_of_flag(names: Iterable[str | os.PathLike[str]]) -> list[Request]:
    """Return the requests of `--imports`, whose paths are relative to the working directory.

    Raises:
        ConfigError: an argument is empty.
    """
    return requests_of([os.fspath(name) for name in names], FLAG, Path.cwd())


def import_own_code(requests: Iterable[Request]) -> list[OwnCode]:
    """Import files and modules, each of them once in a process.

    Returns:
        The imported code with absolute paths and digests, each module once.

    Raises:
        ConfigError: one line that names the source, the file or module, and the line of its code.
    """
    found: dict[str, OwnCode] = {}
    for request in requests:
        code = _import(request)
        found[code.name] = code
    return list(found.values())


def imported_for(recorded: Iterable[OwnCode], source: str) -> list[OwnCode]:
    """Return the imported code that a checkpoint or a run folder needs. Nothing is imported.

    Args:
        recorded: the code that the config of the checkpoint names.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: some of it has not been imported; the message shows the flags to give.
    """
    recorded = list(recorded)
    missing = [code for code in recorded if code.name not in sys.modules]
    if missing:
        flags = " ".join(f"{FLAG} {shlex.quote(code.file_or_module)}" for code in missing)
        gone = [
            code.file_or_module for code in missing if code.file and not Path(code.file).is_file()
        ]
        moved = ""
        if gone:
            moved = f" (no longer there: {', '.join(gone)}; give its new path)"
        raise CheckpointError(
            f"{source}: needs a user's own code, which only a flag or -c can run:"
            f" add {one_line(flags, 400)}{moved}"
        )
    # A program may have imported a module itself, without this function
    return [_imported.get(code.name) or _with_digest(code) for code in recorded]


def changes(recorded: Iterable[OwnCode], now: Iterable[OwnCode]) -> list[str]:
    """Return a warning for each file that has changed since a run recorded it."""
    before = {code.name: code for code in recorded if code.sha256 is not None}
    return [
        f"imports: {code.file_or_module}: has changed since the run started"
        for code in now
        if code.name in before and code.sha256 != before[code.name].sha256
    ]


def own_class(name: str, kind: type, key: str) -> type:
    """Return the class of a dotted name, such as `my_module.Lion`, from a user's own code.

    Args:
        name: module and class.
        kind: the base class that it must have.
        key: the config key of the name.

    Raises:
        ConfigError: the module was not imported, or it has no such class.
    """
    module, _, short = name.rpartition(".")
    shown = repr(one_line(name, 80))
    # A config must not reach classes of other modules: constructing one could run any code
    if module not in sys.modules or not _is_imported(module):
        raise ConfigError(
            f"{key}: {shown}: the module {one_line(module, 80)} is not among the imports"
        )
    found = vars(sys.modules[module])
    cls = found.get(short)
    if not inspect.isclass(cls) or not issubclass(cls, kind):
        known = [other for other in found if inspect.isclass(found[other])]
        hint = registry.did_you_mean(short, known)
        raise ConfigError(
            f"{key}: {shown}: expected a subclass of {kind.__name__} in {module}{hint}"
        )
    return cls


def _is_imported(module: str) -> bool:
    """Whether a module, or another one of its package, was imported as a user's own code."""
    package = module.partition(".")[0]
    return any(name.partition(".")[0] == package for name in _imported)


def _import(request: Request) -> OwnCode:
    code = request.code
    if code.file is None:
        return _import_module(request)
    # Not Path.resolve(), which follows links: the module is named after the link
    path = request.folder / os.path.expanduser(code.file)  # noqa: PTH111
    file = Path(os.path.abspath(path))  # noqa: PTH100
    known = _imported.get(file.stem)
    if known is not None:
        if known.file is not None and Path(known.file).resolve() == file.resolve():
            return known
        raise _error(
            request, f"{known.file_or_module} is already the module {file.stem}: rename one of them"
        )
    return _import_file(request, file)


def _import_file(request: Request, file: Path) -> OwnCode:
    name = file.stem
    try:
        source = file.read_bytes()
    except OSError as error:
        reason = error.strerror
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        elif isinstance(error, IsADirectoryError):
            reason = "is a folder: expected a Python file, or the name of a module"
        raise _error(request, f"{reason} (looked for {file})") from None
    if "." in name:
        raise _error(request, f"{name!r} cannot be the name of a module: rename the file")
    digest = hashlib.sha256(source).hexdigest()
    code = OwnCode(file=str(file), sha256=digest)
    loaded = sys.modules.get(name)
    if loaded is not None and _file_of(loaded) == file.resolve():
        # The user's program has imported the file itself
        return _remember(code)
    hidden = _hidden_by(name, file)
    if hidden is not None:
        raise _error(request, f"would hide {hidden}: rename the file")
    # So that the file can import its neighbors. At the end of the path they hide no other module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))

    def run() -> None:
        loader = _Source(file, source)
        spec = spec_from_file_location(name, file, loader=loader)
        assert spec is not None, "a loader was given"  # noqa: S101
        # Registered before it runs, because dataclasses and pickle look up the module by name
        sys.modules[name] = module_from_spec(spec)
        loader.exec_module(sys.modules[name])

    _run(request, code, file, run)
    return _remember(code)


def _import_module(request: Request) -> OwnCode:
    name = request.code.module or ""
    known = _imported.get(name)
    if known is not None:
        return known
    if not all(name.split(".")):
        raise _error(request, "expected a Python file, such as my_layers.py, or a module's name")
    if name.partition(".")[0] in ROOMS:
        raise _error(request, "is a room of this project: expected a module of your own")
    _run(request, request.code, None, lambda: importlib.import_module(name))
    return _remember(_with_digest(OwnCode(module=name)))


def _remember(code: OwnCode) -> OwnCode:
    _imported[code.name] = code
    return code


def _with_digest(code: OwnCode) -> OwnCode:
    """Return the code with the present digest of the file of its loaded module."""
    file = _file_of(sys.modules[code.name])
    digest = None
    if file is not None and file.is_file():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if code.file is not None and file is not None:
        return OwnCode(file=str(file), sha256=digest)
    return OwnCode(file=code.file, module=code.module, sha256=digest)


def _file_of(module: ModuleType) -> Path | None:
    # built-in modules and namespace packages have no file
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()


def _hidden_by(name: str, file: Path) -> str | None:
    """Return the other module that a file of this name would hide, or None."""
    command = ROOT / f"{name}.py"
    # A user's own file may lie in the clone, beside the commands
    if name in ROOMS or (command.is_file() and command.resolve() != file.resolve()):
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
    """A loader that runs exactly the bytes that were hashed, even if the file has changed since."""

    def __init__(self, file: Path, source: bytes) -> None:
        self.file = file
        self.source = source

    def get_filename(self, fullname: str) -> str:
        return str(self.file)

    def get_data(self, path: str | bytes) -> bytes:
        return self.source


def _run(request: Request, code: OwnCode, file: Path | None, run: Callable[[], object]) -> None:
    """Run the code, and restore the tables if it fails or replaces an entry.

    What it changes of the whole process is restored in any case, with a warning.
    """
    before = {name: dict(table) for name, table in tables().items()}
    modules = set(sys.modules)
    try:
        with surroundings_kept() as changed:
            run()
        problem = _problem_with_tables(before)
        if problem is not None:
            raise _error(request, problem)
    # Also KeyboardInterrupt: the tables must be restored in any case
    except BaseException as error:
        for name, table in tables().items():
            table.clear()
            table.update(before[name])
        if code.name not in modules:
            sys.modules.pop(code.name, None)
        if isinstance(error, ProjectError | KeyboardInterrupt):
            raise
        raise _error(request, _reason(error, code, file)) from error
    for name, table in tables().items():
        for entry in table.keys() - before[name].keys():
            _owners[name, entry] = code.file_or_module
    # All processes of torchrun run the same code.
    if changed and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "%s: %s: changed %s; restored, because the whole process shares such settings",
            request.source,
            one_line(request.code.file_or_module, 200),
            ", ".join(changed),
        )


def tables() -> dict[str, dict[Any, Any]]:
    """Return the tables of `base.registry` by their names."""
    return {
        name: table
        for name, table in vars(registry).items()
        if name.isupper() and isinstance(table, dict)
    }


def _problem_with_tables(before: Mapping[str, Mapping[Any, Any]]) -> str | None:
    """Return what the code has done wrong to the tables; None if it only added valid entries."""
    for name, table in tables().items():
        for entry, old in before[name].items():
            if table.get(entry) is not old:
                verb = "replaces" if entry in table else "removes"
                owner = _owners.get((name, entry)) or _source_file(old)
                return f"{verb} {name}[{entry!r}] of {owner}: choose another name"
        for entry in table.keys() - before[name].keys():
            if not isinstance(entry, str) or not callable(table[entry]):
                return f"{name}[{entry!r}]: expected a name, and a class or function for it"
            try:
                inspect.signature(table[entry])
            except (TypeError, ValueError):
                return (
                    f"{name}[{entry!r}]: Python cannot tell its arguments;"
                    " wrap it in a function that names them"
                )
    return None


def _source_file(entry: Any) -> str:
    """The file that defines an entry of a table."""
    # A functools.partial has no file
    entry = getattr(entry, "func", entry)
    try:
        file = Path(inspect.getsourcefile(entry) or "")
    # built-in classes
    except TypeError:
        return "this project"
    if file.is_relative_to(ROOT):
        file = file.relative_to(ROOT)
    return str(file)


def _error(request: Request, problem: str) -> ConfigError:
    return ConfigError(
        f"{request.source}: {one_line(request.code.file_or_module, 200)}: {one_line(problem, 400)}"
    )


def _reason(error: BaseException, code: OwnCode, file: Path | None) -> str:
    """Return the line, type and message of an error that the code has raised."""
    if isinstance(error, SyntaxError):
        # Python names no line of a file that holds null bytes
        where = "" if error.lineno is None else f"line {error.lineno}: "
        # The error may be in another file that the code imports
        if error.filename not in (None, str(file)):
            where = f"{error.filename}, {where}"
        return f"{where}{type(error).__name__}: {error.msg}"
    missing = ""
    if isinstance(error, ModuleNotFoundError):
        missing = error.name or ""
    # Here the module itself is missing, or a package that holds it, not one that it imports
    if file is None and missing and f"{code.name}.".startswith(f"{missing}."):
        return "no such module; a folder of modules is searched if PYTHONPATH names it"
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        # The innermost line of the user's file, not one of a library that it calls
        if file is not None and frame.filename == str(file):
            place = f"line {frame.lineno}: "
    hint = ""
    room = missing.partition(".")[0]
    if room in ROOMS:
        hint = f"; {room} is a room of this project, which comes first"
    message = f": {error}" if str(error) else ""
    return f"{place}{type(error).__name__}{message}{hint}"
