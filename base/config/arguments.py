"""The arguments of a constructor as a config sees them, and the sections that accept them.

`arguments_of` reads them from a class or function: names and defaults from its signature, types and
ranges from its type hints, descriptions from the `Args:` of its docstring. An `OpenSection` holds
fixed keys, and the arguments of the entries of tables that the config chooses.
"""

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
    core_schema,
)

from base.config.section import Section
from base.registry import Constructor, attribute_of, not_one_of

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
ARGUMENT_OF_OTHERS = "argument_of_others"
"""The type of the error for an argument that only other entries of a table take."""
ARGUMENT_LINE = re.compile(r"(\*{0,2}\w+(?:, *\*{0,2}\w+)*)(?: *\(.*?\))?: *(.*)")
"""A line of `Args:` that begins the description of one or several arguments."""


@dataclass(frozen=True)
class Argument:
    """An argument that a config may give to a constructor.

    Attributes:
        name: its name in the constructor.
        key: its name in configs: the same, unless the entry's `config_names` give another one.
        field: its type, range, default and description, in the form of a section's own key.
        adapter: checks its values and converts them from JSON's types to Python's.
    """

    name: str
    key: str
    field: FieldInfo
    adapter: TypeAdapter[Any]


@lru_cache(maxsize=1024)
def arguments_of(entry: Constructor) -> Mapping[str, Argument]:
    """Return the arguments of a constructor that JSON can hold, in the order of its signature.

    A class that passes `**others` on also has the arguments of its base classes. Arguments that a
    `functools.partial` gives by position are left out. The entry's attribute `config_names` lists
    arguments that have another name in configs, or that configs may not give; see `base.registry`.

    Args:
        entry: a class or function, or a partial of one.

    Returns:
        Config key -> argument.
    """
    hints = _hints(entry)
    texts = _descriptions(entry)
    names = attribute_of(entry, "config_names", {})
    arguments = {}
    for parameter in parameters_of(entry):
        key = names.get(parameter.name, parameter.name)
        adapter = adapter_of(hints.get(parameter.name, Any))
        if key is None or adapter is None:
            continue
        field = FieldInfo.from_annotation(hints.get(parameter.name, Any))
        # pydantic would take the marker `Parameter.empty` for a default
        if parameter.default is not parameter.empty:
            field.default = parameter.default
        field.description = texts.get(parameter.name, "")
        arguments[key] = Argument(parameter.name, key, field, adapter)
    return arguments


def parameters_of(entry: Constructor) -> list[inspect.Parameter]:
    """Return the parameters of a constructor that can be given by name, including those of the base
    classes to which it passes `**others`."""
    found: dict[str, inspect.Parameter] = {}
    for function in _functions(entry):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in NAMED and parameter.name != "self":
                # The first one wins: a class overrides the parameters of its base classes
                found.setdefault(parameter.name, parameter)
    return [*found.values()]


def takes(entry: Constructor, name: str) -> bool:
    """Whether a constructor takes an argument of this name."""
    return any(parameter.name == name for parameter in parameters_of(entry))


def accepts_any_keyword(entry: Constructor) -> bool:
    """Whether a constructor, with the base classes that it passes `**others` to, takes any name."""
    *_, last = _functions(entry)
    return _has_var_keyword(last)


def _functions(entry: Constructor) -> Iterator[Callable[..., Any]]:
    """Yield the functions that the arguments of a constructor reach: the constructor, and
    `__init__` of its base classes while the one before passes `**others` on."""
    # A partial has the signature of its function without the arguments that it gives by position
    whole = entry
    while isinstance(entry, partial):
        entry = entry.func
    yield whole
    if not inspect.isclass(entry) or not _has_var_keyword(whole):
        return
    # The last class of every __mro__ is `object`, which takes no arguments
    initialized = [base for base in entry.__mro__[:-1] if "__init__" in vars(base)]
    for base in initialized[1:]:
        yield base.__init__
        if not _has_var_keyword(base.__init__):
            return


def _has_var_keyword(function: Callable[..., Any]) -> bool:
    return any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(function).parameters.values()
    )


def _hints(entry: Constructor) -> dict[str, Any]:
    """Parameter -> its type hint, with ranges."""
    hints: dict[str, Any] = {}
    for function in _functions(entry):
        while isinstance(function, partial):
            function = function.func
        if inspect.isclass(function):
            function = function.__init__
        try:
            resolved = get_type_hints(function, include_extras=True)
        # Hints may name types that are imported for type checkers only; any value passes then
        except (NameError, TypeError, AttributeError):
            resolved = {}
        hints = resolved | hints
    return hints


def _descriptions(entry: Constructor) -> dict[str, str]:
    """Parameter -> its description in the `Args:` of the class or of a base class."""
    while isinstance(entry, partial):
        entry = entry.func
    documented = reversed(entry.__mro__) if inspect.isclass(entry) else [entry]
    found: dict[str, str] = {}
    for source in documented:
        # Not inspect.getdoc, which gives a class without a docstring that of a base class
        for text in (source.__doc__, getattr(vars(source).get("__init__"), "__doc__", None)):
            if isinstance(text, str):
                found |= _args_section(inspect.cleandoc(text))
    return found


def _args_section(text: str) -> dict[str, str]:
    """Argument -> description in a docstring's `Args:`."""
    _, _, section = text.partition("\nArgs:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        indent = len(line) - len(line.lstrip())
        start = ARGUMENT_LINE.fullmatch(line.strip())
        # Lines that continue a description are indented further, and may hold a colon, too
        if start and indent <= 4:
            names = [name.strip().lstrip("*") for name in start[1].split(",")]
            found |= dict.fromkeys(names, start[2])
        elif line.strip():
            for name in names:
                found[name] += f" {line.strip()}"
    return found


@lru_cache(maxsize=1024)
def adapter_of(hint: Any, *, any_classes: bool = False) -> TypeAdapter[Any] | None:
    """Return an adapter that checks values of a type.

    None for a type that JSON cannot hold, or cannot hold in part, unless `any_classes` is set.
    """
    config = ConfigDict(strict=True, arbitrary_types_allowed=any_classes)
    try:
        try:
            return TypeAdapter(hint, config=config)
        # A dataclass or a pydantic model has its own config and accepts no other one
        except PydanticUserError:
            return TypeAdapter(hint)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return None


@lru_cache(maxsize=1024)
def _open_arguments(
    entry: Constructor, contract: frozenset[str], positional: int
) -> Mapping[str, Argument]:
    """The arguments of an entry, except those that the project gives itself; see `Choice`."""
    first = {parameter.name for parameter in parameters_of(entry)[:positional]}
    every = arguments_of(entry).items()
    return {key: argument for key, argument in every if argument.name not in contract | first}


@dataclass(frozen=True, eq=False)
class Choice:
    """A key that chooses an entry of a table, whose arguments an open section then accepts.

    Attributes:
        key: the dotted key that names the entry.
        table: the entries.
        contract: arguments that the project gives itself, so that the section does not accept them.
        positional: how many of the first arguments the project gives by position; the section does
            not accept them either.
        others: what happens to a key that only other entries take: an `error`, or it is `ignored`
            with a warning.
    """

    key: str
    table: Mapping[str, Constructor]
    contract: frozenset[str] = frozenset()
    positional: int = 0
    others: Literal["error", "ignored"] = "error"

    def arguments(self, name: str) -> Mapping[str, Argument]:
        """Return config key -> argument of an entry; empty if the table has no such entry."""
        if name not in self.table:
            return {}
        return _open_arguments(self.table[name], self.contract, self.positional)

    def owners(self, key: str) -> dict[str, Argument]:
        """Return entry -> its argument of this key, for every entry that takes it."""
        found = {}
        for name in self.table:
            argument = self.arguments(name).get(key)
            if argument is not None:
                found[name] = argument
        return found

    def known_keys(self) -> list[str]:
        """Return the keys of all arguments of all entries."""
        return list(dict.fromkeys(key for name in self.table for key in self.arguments(name)))


class OpenSection(Section):
    """A section with fixed keys and the arguments of the chosen entries of tables.

    The arguments can be read like its own keys: `section.steps`, or `section.get("steps")` if it
    may not be given. Those that are given are dumped with the fixed keys.
    """

    model_config = ConfigDict(extra="allow")
    choices: ClassVar[tuple[Choice, ...]] = ()
    """The entries whose arguments it accepts. A key that several chosen entries know is given to
    all of them."""
    fills_defaults: ClassVar[bool] = False
    """Whether a resolved config holds every argument of every entry whose default is not null."""

    @model_validator(mode="wrap")
    @classmethod
    def _check_keys(
        cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        """Report unknown keys together with everything that is wrong with the others."""
        problems: list[InitErrorDetails] = []
        if isinstance(value, dict) and checks_names(info.context):
            known = cls.known_fields()
            problems = [
                InitErrorDetails(type="extra_forbidden", loc=(key,), input=value[key])
                for key in value
                if key not in known
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
        """The arguments of entries that are given: key -> value."""
        return dict(self.model_extra or {})

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or `default` if it is an argument that is not given."""
        if key in type(self).model_fields:
            return getattr(self, key)
        return self.given.get(key, default)

    def arguments_for(self, choice_key: str, name: str) -> dict[str, Any]:
        """Return the arguments that are given for an entry.

        Args:
            choice_key: the `key` of one of `choices`.
            name: the entry.

        Returns:
            The constructor's name of the argument -> value.
        """
        choice = next(choice for choice in self.choices if choice.key == choice_key)
        return {
            argument.name: self.given[key]
            for key, argument in choice.arguments(name).items()
            if key in self.given
        }

    @classmethod
    def chosen(cls, config: Any) -> dict[str, str]:
        """Return the `key` of each choice -> the name of the entry that a config chooses."""
        return {
            choice.key: reduce(getattr, choice.key.split("."), config) for choice in cls.choices
        }

    @classmethod
    def defaults(cls, chosen: Mapping[str, str]) -> dict[str, Any]:
        """Return key -> default for every argument of every entry whose default is not null.

        Entries may have different defaults for a key. The one of the chosen entry wins, otherwise
        that of the first entry that takes it.
        """
        found: dict[str, Any] = {}
        for choice in cls.choices:
            own = choice.arguments(chosen.get(choice.key, ""))
            for key in choice.known_keys():
                argument = own.get(key) or next(iter(choice.owners(key).values()))
                if not argument.field.is_required() and argument.field.default is not None:
                    found.setdefault(key, argument.field.default)
        return found

    def fill_defaults(self, chosen: Mapping[str, str]) -> None:
        """Set arguments that are not given to their defaults; see `defaults`."""
        # Sections are frozen, but pydantic keeps extra keys in a plain dictionary
        extra = self.model_extra
        if extra is not None:
            for key, value in self.defaults(chosen).items():
                extra.setdefault(key, value)

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        """Return its fixed keys, and the arguments of all entries of its tables."""
        known = dict(cls.model_fields)
        for choice in cls.choices:
            for name in choice.table:
                for key, argument in choice.arguments(name).items():
                    known.setdefault(key, argument.field)
        return known

    @classmethod
    def owners(cls, key: str) -> dict[str, Argument]:
        """Return entry -> its argument of this key, for every entry of any table that takes it."""
        return {
            name: argument
            for choice in cls.choices
            for name, argument in choice.owners(key).items()
        }

    def check(self, chosen: Mapping[str, str], place: tuple[str, ...] = ()) -> None:
        """Check the given arguments against the chosen entries, and convert them to their types.

        Args:
            chosen: the `key` of each choice -> the name of its entry. A choice that is not known
                yet is left out; a value that any of its entries takes is accepted then.
            place: the path of this section below the one whose validator calls this.

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
        """Return the value of a key, converted by the chosen entries that take it, or by others."""
        owners = {choice: choice.owners(key) for choice in self.choices}
        takers = [
            owners[choice][chosen[choice.key]]
            for choice in self.choices
            if chosen.get(choice.key) in owners[choice]
        ]
        if takers:
            # All chosen entries that take the key must accept the value
            values = [argument.adapter.validate_json(json.dumps(value)) for argument in takers]
            return values[0]
        knowing = [choice for choice in self.choices if owners[choice]]
        for choice in knowing:
            # It is an error only if no table can still accept or ignore the key
            if choice.others == "ignored" or choice.key not in chosen:
                adapters = [argument.adapter for argument in owners[choice].values()]
                return _first_fit(adapters, value)
        choice = knowing[0]
        others = " and ".join(owners[choice])
        verb = "take" if len(owners[choice]) > 1 else "takes"
        text = f"only {others} {verb} it, not {chosen[choice.key]}"
        # pydantic replaces braces in a message, and an entry's name may contain some
        raise PydanticCustomError(ARGUMENT_OF_OTHERS, "{text}", {"text": text})

    def _missing(self, chosen: Mapping[str, str]) -> Iterator[str]:
        """Yield the required arguments of the chosen entries that are not given."""
        for choice in self.choices:
            if choice.key in chosen:
                for key, argument in choice.arguments(chosen[choice.key]).items():
                    if argument.field.is_required() and self.get(key) is None:
                        yield key

    def unused(self, chosen: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
        """Yield the given arguments that no chosen entry takes.

        Yields:
            Key, value and the entries that would take it, such as `arch.args.norm_layer_type gn`.
        """
        for key, value in self.given.items():
            owners = {choice: choice.owners(key) for choice in self.choices}
            owners = {choice: takers for choice, takers in owners.items() if takers}
            if any(chosen.get(choice.key) in takers for choice, takers in owners.items()):
                continue
            arguments = [argument for takers in owners.values() for argument in takers.values()]
            # A default is not a mistake: resolved configs hold the defaults of all entries
            if arguments and all(argument.field.default != value for argument in arguments):
                names = [f"{choice.key} {' or '.join(takers)}" for choice, takers in owners.items()]
                yield key, value, " or ".join(names)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema allows unknown keys, because a user's own entry may take them."""
        reference = handler(schema)
        schema = handler.resolve_ref_schema(reference)
        for key in cls.known_fields():
            if key not in cls.model_fields:
                schema["properties"][key] = _property(cls.owners(key))
        return reference


def describe_argument(owners: Mapping[str, Argument]) -> str:
    """Return the entries that take an argument, and the first description that one of them has."""
    for argument in owners.values():
        if argument.field.description:
            return f"{', '.join(owners)}: {argument.field.description}"
    return ", ".join(owners)


def _first_fit(adapters: Iterable[TypeAdapter[Any]], value: Any) -> Any:
    """Return the value as the first type that accepts it converts it.

    Raises:
        ValidationError: the first type's, if none accepts the value.
    """
    errors: list[ValidationError] = []
    for adapter in adapters:
        try:
            return adapter.validate_json(json.dumps(value))
        except ValidationError as error:
            errors.append(error)
    raise errors[0]


def _moved(problem: ErrorDetails, place: tuple[str, ...]) -> InitErrorDetails:
    """Return a problem in a value as a problem of the tree that holds the value at `place`."""
    location = (*place, *problem["loc"])
    details = InitErrorDetails(type=problem["type"], loc=location, input=problem["input"])
    # pydantic builds the message again from type and context
    if "ctx" in problem:
        details["ctx"] = problem["ctx"]
    return details


def _property(owners: Mapping[str, Argument]) -> dict[str, Any]:
    """Return the JSON Schema of an argument that one or several entries take."""
    kinds: list[dict[str, Any]] = []
    for argument in owners.values():
        kind = argument.adapter.json_schema()
        if kind not in kinds:
            kinds.append(kind)
    # Entries may take the same key with different types
    schema = dict(kinds[0]) if len(kinds) == 1 else {"anyOf": kinds}
    schema["description"] = describe_argument(owners)
    return schema


@dataclass(frozen=True, eq=False)
class NameIn:
    """Metadata of a type: the text is a name in a table, as in `Annotated[str, NameIn(MODELS)]`.

    Any name is accepted if the context of the validation is `UNCHECKED`.

    Attributes:
        table: the entries.
        positional: names of the arguments that the project gives to each entry by position.
        keywords: names of those that it gives by keyword.
    """

    table: Mapping[str, Any]
    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """The schema of text, followed by a lookup in the table."""
        return core_schema.with_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Editors complete the known names, and accept those that a user's code may register."""
        return {"anyOf": [{"enum": list(self.table), "type": "string"}, handler(schema)]}

    def _known(self, name: str, info: Any) -> str:
        if not checks_names(info.context):
            return name
        if not self.table:
            # A mistake in a program, not in a config: with empty tables every name would be wrong
            raise RuntimeError(
                "the tables are empty: import experiment, which fills them, before a check"
            )
        if name not in self.table:
            raise ValueError(not_one_of(name, self.table))
        # A user's entry that the project cannot call is reported here, not when the model is built
        try:
            signature = inspect.signature(self.table[name])
            signature.bind_partial(*self.positional, **dict.fromkeys(self.keywords))
        except (TypeError, ValueError) as error:
            call = ", ".join([*self.positional, *(f"{keyword}=..." for keyword in self.keywords)])
            raise ValueError(f"{name!r} cannot be called as ({call}): {error}") from None
        return name


UNCHECKED = {"names": False}
"""The validation context for a config whose entries may not be registered, as in reports."""


def checks_names(context: Any) -> bool:
    """Return whether a validation checks names and arguments of entries against the tables."""
    return context is None or context.get("names", True)
