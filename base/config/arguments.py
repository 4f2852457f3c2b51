"""The arguments of a constructor as a config sees them, and the sections that are open to them.

`arguments_of` reads them off a class or function: names and defaults from its signature, types and
ranges from its type hints, descriptions from the `Args:` of its docstring. An `OpenSection` holds
fixed keys, and whatever the chosen entries of its tables take."""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any, ClassVar, Literal, Self, get_type_hints

from pydantic import (
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.errors import (
    PydanticSchemaGenerationError,
    PydanticUndefinedAnnotation,
    PydanticUserError,
)
from pydantic.fields import FieldInfo
from pydantic_core import (
    ErrorDetails,
    InitErrorDetails,
    PydanticCustomError,
    PydanticUndefined,
    core_schema,
)

from base.config.section import Section
from base.registry import Constructor, not_one_of, property_of

STRICT = ConfigDict(strict=True)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
ARGUMENT_OF_OTHERS = "argument_of_others"
"""The type of the error for an argument that only other entries of a table take."""
ARGUMENT_LINE = re.compile(r"(\*{0,2}\w+(?:, *\*{0,2}\w+)*)(?: *\(.*?\))?: *(.*)")
"""A line of `Args:` that begins the description of one or several arguments."""


@dataclass(frozen=True)
class Argument:
    """An argument that a config may give to a constructor.

    Attributes:
        name: what the constructor calls it.
        key: what a config calls it: the same, unless the entry's `config_names` say otherwise.
        field: its type, range, default and description, as those of a section's own key.
        adapter: what checks its values, and turns those of JSON into those of Python.
    """

    name: str
    key: str
    field: FieldInfo
    adapter: TypeAdapter[Any]


@lru_cache(maxsize=1024)
def arguments_of(entry: Constructor) -> Mapping[str, Argument]:
    """Config key -> argument, of every argument of a constructor that JSON can hold, in the order
    of its signature.

    A class that hands `**others` on has the arguments of the base classes, too; those that a
    `functools.partial` gives by position are left out. The entry's attribute `config_names` tells
    arguments that configs know by another name, or may not give; see `base.registry`.

    Args:
        entry: a class or function, or a partial of one.
    """
    hints, texts = _hints(entry), _descriptions(entry)
    names = property_of(entry, "config_names", {})
    arguments = {}
    for parameter in parameters_of(entry):
        key = names.get(parameter.name, parameter.name)
        adapter = _adapter(hints.get(parameter.name, Any))
        if key is None or adapter is None:
            continue
        default = PydanticUndefined if parameter.default is parameter.empty else parameter.default
        field = FieldInfo.from_annotation(hints.get(parameter.name, Any))
        field.default = default
        field.description = texts.get(parameter.name, "")
        arguments[key] = Argument(parameter.name, key, field, adapter)
    return arguments


def parameters_of(entry: Constructor) -> list[inspect.Parameter]:
    """The parameters of a constructor that can be given by name, including those of the base
    classes that it hands `**others` on to."""
    found: dict[str, inspect.Parameter] = {}
    for function in _functions(entry):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in NAMED and parameter.name != "self":
                found.setdefault(parameter.name, parameter)
    return [*found.values()]


def takes(entry: Constructor, name: str) -> bool:
    """Whether a constructor takes an argument of this name."""
    return any(parameter.name == name for parameter in parameters_of(entry))


def hands_on(entry: Constructor) -> bool:
    """Whether a constructor hands on, as `**others`, every argument that it does not name."""
    *_, last = _functions(entry)
    return _hands_on(last)


def _functions(entry: Constructor) -> Iterator[Callable[..., Any]]:
    """The functions that arguments of a constructor reach: its own first, and those of its base
    classes as long as the one before hands `**others` on."""
    whole = entry
    while isinstance(entry, partial):
        entry = entry.func
    yield whole
    if not inspect.isclass(entry) or not _hands_on(whole):
        return
    own = _where_initialized(entry)
    for base in own[1:]:
        yield base.__init__
        if not _hands_on(base.__init__):
            return


def _where_initialized(cls: type) -> list[type]:
    """The classes in a class's `__mro__` that define `__init__`, nearest first, without
    `object`."""
    return [base for base in cls.__mro__[:-1] if "__init__" in vars(base)]


def _hands_on(function: Callable[..., Any]) -> bool:
    return any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(function).parameters.values()
    )


def _hints(entry: Constructor) -> dict[str, Any]:
    """Parameter -> its type hint, with ranges; empty for a function whose hints cannot be
    resolved."""
    hints: dict[str, Any] = {}
    for function in _functions(entry):
        while isinstance(function, partial):
            function = function.func
        for source in [function.__init__] if inspect.isclass(function) else [function]:
            try:
                resolved = get_type_hints(source, include_extras=True)
            except (NameError, TypeError, AttributeError):
                resolved = {}
            hints = resolved | hints
    return hints


def _descriptions(entry: Constructor) -> dict[str, str]:
    """Parameter -> what the `Args:` of its docstring says; a base class's where it hands arguments
    on."""
    while isinstance(entry, partial):
        entry = entry.func
    documented = reversed(entry.__mro__) if inspect.isclass(entry) else [entry]
    found: dict[str, str] = {}
    for source in documented:
        # inspect.getdoc would give a class without a docstring that of a base class
        for text in (source.__doc__, getattr(vars(source).get("__init__"), "__doc__", None)):
            found |= _args_section(inspect.cleandoc(text)) if isinstance(text, str) else {}
    return found


def _args_section(text: str) -> dict[str, str]:
    """Argument -> description, of a docstring's `Args:`."""
    _, _, section = text.partition("\nArgs:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        indent = len(line) - len(line.lstrip())
        begins = ARGUMENT_LINE.fullmatch(line.strip()) if indent <= 4 else None
        if begins:
            names = [name.strip().lstrip("*") for name in begins[1].split(",")]
            found |= dict.fromkeys(names, begins[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


@lru_cache(maxsize=1024)
def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    """What checks values of a type; None for a type that JSON cannot hold."""
    try:
        try:
            return TypeAdapter(hint, config=STRICT)
        except PydanticUserError:  # a dataclass or another model, which has a config of its own
            return TypeAdapter(hint)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return None


@lru_cache(maxsize=1024)
def _open_arguments(
    entry: Constructor, contract: frozenset[str], positional: int
) -> Mapping[str, Argument]:
    """`arguments_of` an entry without those that the project itself gives; see `Choice`."""
    first = {parameter.name for parameter in parameters_of(entry)[:positional]}
    every = arguments_of(entry).items()
    return {key: argument for key, argument in every if argument.name not in contract | first}


@dataclass(frozen=True, eq=False)
class Choice:
    """A key that chooses an entry of a table, whose arguments may then stand in an open section.

    Attributes:
        key: the dotted key that names the entry.
        table: the entries.
        contract: arguments that are not the section's, because the project itself gives them.
        positional: how many of the first arguments the project gives by position; they are not the
            section's either.
        others: what becomes of a key that only other entries take: `error` refuses it, `ignored`
            warns of it.
    """

    key: str
    table: Mapping[str, Constructor]
    contract: frozenset[str] = frozenset()
    positional: int = 0
    others: Literal["error", "ignored"] = "error"

    def arguments(self, name: str) -> Mapping[str, Argument]:
        """Config key -> argument of an entry; nothing where the table has none of this name."""
        if name not in self.table:
            return {}
        return _open_arguments(self.table[name], self.contract, self.positional)

    def owners(self, key: str) -> dict[str, Argument]:
        """Entry -> its argument of this key, for every entry that takes it."""
        every = {name: self.arguments(name).get(key) for name in self.table}
        return {name: argument for name, argument in every.items() if argument is not None}

    def known_keys(self) -> list[str]:
        """The keys that the entries take between them."""
        return list(dict.fromkeys(key for name in self.table for key in self.arguments(name)))


class OpenSection(Section):
    """A section with fixed keys, and those that the chosen entries of tables take.

    Those others are values like its own: `section.steps`, and `section.get("steps")` where it may
    not be given. They are dumped beside the fixed ones, where they are given."""

    model_config = ConfigDict(extra="allow")
    choices: ClassVar[tuple[Choice, ...]] = ()
    """Whose arguments it is open to. A key that several of them know reaches all that are
    chosen."""
    fills_defaults: ClassVar[bool] = False
    """Whether a resolved config holds every argument that has a default other than null, whichever
    entry takes it."""

    @model_validator(mode="wrap")
    @classmethod
    def _known_keys(
        cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        """Refuse keys that no entry knows, together with whatever is wrong with the others."""
        problems: list[InitErrorDetails] = []
        if isinstance(value, dict) and checks_names(info.context):
            unknown = value.keys() - cls.known_fields().keys()
            problems = [
                InitErrorDetails(type="extra_forbidden", loc=(key,), input=value[key])
                for key in value
                if key in unknown
            ]
        try:
            section = handler(value)
        except ValidationError as error:
            problems = [*(_moved(problem, ()) for problem in error.errors()), *problems]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return section

    @property
    def given(self) -> dict[str, Any]:
        """Key -> value of what is given of the entries' arguments."""
        return dict(self.model_extra or {})

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; `default` where an entry's argument is not given."""
        return (
            getattr(self, key, default)
            if key in type(self).model_fields
            else self.given.get(key, default)
        )

    def arguments_for(self, choice_key: str, name: str) -> dict[str, Any]:
        """What is given of an entry's arguments: the constructor's name for it -> value.

        Args:
            choice_key: the `key` of one of `choices`.
            name: the entry.
        """
        choice = next(choice for choice in self.choices if choice.key == choice_key)
        return {
            argument.name: self.given[key]
            for key, argument in choice.arguments(name).items()
            if key in self.given
        }

    @classmethod
    def chosen(cls, config: Any) -> dict[str, str]:
        """The `key` of each choice -> the name of the entry that a config chooses."""
        return {
            choice.key: reduce(getattr, choice.key.split("."), config) for choice in cls.choices
        }

    @classmethod
    def defaults(cls, chosen: Mapping[str, str]) -> dict[str, Any]:
        """Key -> default, other than null, of all arguments of all entries: that of the chosen
        entry, or, where it takes none of this name, that of the first that does."""
        found: dict[str, Any] = {}
        for choice in cls.choices:
            own = choice.arguments(chosen.get(choice.key, ""))
            for key in choice.known_keys():
                argument = own.get(key) or next(iter(choice.owners(key).values()))
                if not argument.field.is_required() and argument.field.default is not None:
                    found.setdefault(key, argument.field.default)
        return found

    def fill_defaults(self, chosen: Mapping[str, str]) -> None:
        """Give what is not given its default; see `defaults`."""
        extra = self.model_extra
        if extra is not None:
            extra |= {
                key: value for key, value in self.defaults(chosen).items() if key not in extra
            }

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        """Its fixed keys, and those of all entries of its tables."""
        known = dict(cls.model_fields)
        for choice in cls.choices:
            for name in choice.table:
                for key, argument in choice.arguments(name).items():
                    known.setdefault(key, argument.field)
        return known

    @classmethod
    def owners(cls, key: str) -> dict[str, Argument]:
        """Entry -> its argument of this key, for every entry of any table that takes it."""
        return {
            name: argument
            for choice in cls.choices
            for name, argument in choice.owners(key).items()
        }

    def check(self, chosen: Mapping[str, str], place: tuple[str, ...] = ()) -> None:
        """Check what is given against the signatures of the chosen entries, and give it their
        types.

        Args:
            chosen: the `key` of each choice -> the name of its entry; a choice that is not yet
                known is left out, and values are then what any of its entries takes.
            place: where this section lies below the one whose validator calls this.

        Raises:
            ValidationError: with an error for each key.
        """
        problems: list[InitErrorDetails] = []
        extra = self.model_extra or {}
        for key, value in self.given.items():
            try:
                extra[key] = self._checked(key, value, chosen)
            except ValidationError as error:
                problems += [_moved(problem, (*place, key)) for problem in error.errors()]
            except PydanticCustomError as error:
                problems.append(InitErrorDetails(type=error, loc=(*place, key), input=value))
        problems += [
            InitErrorDetails(type="missing", loc=(*place, key), input=None)
            for key in self._missing(chosen)
        ]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)

    def _checked(self, key: str, value: Any, chosen: Mapping[str, str]) -> Any:
        """The value of a key as the chosen entries take it, or, where none does, as others do."""
        owners = {choice: choice.owners(key) for choice in self.choices}
        takers = [
            owners[choice][chosen[choice.key]]
            for choice in self.choices
            if chosen.get(choice.key) in owners[choice]
        ]
        if takers:
            values = [argument.adapter.validate_json(json.dumps(value)) for argument in takers]
            return values[0]
        knowing = [choice for choice in self.choices if owners[choice]]
        choice = next(
            (
                choice
                for choice in knowing
                if choice.others == "ignored" or choice.key not in chosen
            ),
            knowing[0],
        )
        if choice.others == "error" and choice.key in chosen:
            others = " and ".join(owners[choice])
            verb = "take" if len(owners[choice]) > 1 else "takes"
            text = f"only {others} {verb} it, not {chosen[choice.key]}"
            raise PydanticCustomError(ARGUMENT_OF_OTHERS, "{text}", {"text": text})
        return _first_fit([argument.adapter for argument in owners[choice].values()], value)

    def _missing(self, chosen: Mapping[str, str]) -> Iterator[str]:
        """The keys that a chosen entry needs and that are not given."""
        for choice in self.choices:
            if choice.key in chosen:
                for key, argument in choice.arguments(chosen[choice.key]).items():
                    if argument.field.is_required() and self.get(key) is None:
                        yield key

    def unused(self, chosen: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
        """Key, value and who takes it, such as `arch.args.norm_layer_type gn`, of all that is given
        without effect: no chosen entry takes it, and no entry has its value as a default."""
        for key, value in self.given.items():
            owners = {choice: choice.owners(key) for choice in self.choices}
            owners = {choice: takers for choice, takers in owners.items() if takers}
            if any(chosen.get(choice.key) in takers for choice, takers in owners.items()):
                continue
            arguments = [argument for takers in owners.values() for argument in takers.values()]
            if arguments and all(argument.field.default != value for argument in arguments):
                yield (
                    key,
                    value,
                    " or ".join(
                        f"{choice.key} {' or '.join(takers)}" for choice, takers in owners.items()
                    ),
                )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Its fixed keys, and those of all entries; others are allowed, as a user's own part may
        have them."""
        reference = handler(schema)
        schema = handler.resolve_ref_schema(reference)
        for key in cls.known_fields():
            if key not in cls.model_fields:
                schema["properties"][key] = _property(cls.owners(key))
        return reference


def _first_fit(adapters: Iterable[TypeAdapter[Any]], value: Any) -> Any:
    """A value as the first type reads it that accepts it; the error is that of the first type."""
    failed: list[ValidationError] = []
    for adapter in adapters:
        try:
            return adapter.validate_json(json.dumps(value))
        except ValidationError as error:
            failed.append(error)
    raise failed[0]


def _moved(problem: ErrorDetails, place: tuple[str, ...]) -> InitErrorDetails:
    """A problem that was found in a value, as a problem of the tree that holds the value."""
    kind = problem["type"]
    details = InitErrorDetails(type=kind, loc=(*place, *problem["loc"]), input=problem["input"])
    if "ctx" in problem:
        details["ctx"] = problem["ctx"]
    return details


def _property(owners: Mapping[str, Argument]) -> dict[str, Any]:
    """What the JSON Schema says of an argument of one or several entries."""
    kinds: list[dict[str, Any]] = []
    for argument in owners.values():
        kind = argument.adapter.json_schema()
        if kind not in kinds:
            kinds.append(kind)
    about = describe(owners)
    described = {"description": about} if about else {}
    return {**(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}), **described}


def describe(owners: Mapping[str, Argument]) -> str:
    """Whose argument it is, and what the first of them says of it."""
    texts = (argument.field.description for argument in owners.values())
    text = next(filter(None, texts), "")
    return f"{', '.join(owners)}: {text}" if text else ", ".join(owners)


@dataclass(frozen=True, eq=False)
class NameIn:
    """Metadata of a type: the text is a name in a table. `Annotated[str, NameIn(MODELS)]`.

    Where a config is read without the code of its parts (`UNCHECKED` is the context), any name is
    good.

    Attributes:
        table: the entries.
        positional: names of the arguments that the project calls each entry with by position.
        keywords: those that it gives by name.
    """

    table: Mapping[str, Any]
    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """The schema of text, followed by a look into the table."""
        return core_schema.with_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Editors complete the names that are known, and accept others."""
        return {"anyOf": [{"enum": list(self.table), "type": "string"}, handler(schema)]}

    def _known(self, name: str, info: Any) -> str:
        if not checks_names(info.context):
            return name
        if not self.table:
            raise RuntimeError(
                "the tables are empty: import experiment, which fills them, before a config is checked"
            )
        if name not in self.table:
            raise ValueError(not_one_of(name, self.table))
        try:
            signature = inspect.signature(self.table[name])
            signature.bind_partial(*self.positional, **dict.fromkeys(self.keywords))
        except (TypeError, ValueError) as error:
            call = ", ".join([*self.positional, *(f"{keyword}=..." for keyword in self.keywords)])
            raise ValueError(f"{name!r} cannot be called as ({call}): {error}") from None
        return name


UNCHECKED = {"names": False}
"""The validation context for a config whose parts' code may be missing, as in reports."""


def checks_names(context: Any) -> bool:
    """Whether names and arguments of parts are checked against the tables in this validation."""
    return context is None or context.get("names", True)
