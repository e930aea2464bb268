"""Functions by name, as recipes, checkpoints and the command line write them: "package.module:function".

`resolve` imports the module: the name comes from the person who starts a training. `resolve_loaded` imports nothing but
m2f_lab itself: the name stands in a checkpoint, which may come from a stranger. `resolve_file` serves the command line,
where the module may be a file: "my_models.py:fpn".

Only plain Python functions and classes count, and only in the module or package that defines them. The standard library
is refused: none of its functions builds a model, and several delete files.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

_REFERENCE = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")
_PACKAGE = __name__.partition(".")[0]


def is_reference(text: str) -> bool:
    """True for text such as "package.module:function"."""
    return _REFERENCE.fullmatch(text) is not None


def reference_to(function: Callable) -> str:
    """Name a function so that it can be found again. The package that exposes it stands for the module that defines it.

    Raises:
        ValueError: it is no function or class at the top level of a module.
    """
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if getattr(sys.modules.get(module), name, None) is not function or not _is_plain(function):
        raise ValueError(
            f"{function!r} cannot be found again by name, so that a run could not be reopened. Pass a function or a "
            "class defined at the top level of a module or notebook, not a lambda, a partial or an inner function."
        )
    package = module.rpartition(".")[0]
    exposes = getattr(sys.modules.get(package), name, None) is function
    return f"{package if exposes else module}:{name}"


def resolve(reference: str) -> Callable:
    """Import the module and return the function.

    Raises:
        ValueError: the name is malformed, there is no such module or function, or it is not a plain function or class
            of that module.
    """
    module, name = _split(reference)
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there; something that it imports is not
            raise ValueError(
                f"There is no module {module!r} for {reference!r}. Start Python where it can be imported, pass the "
                "function itself (build=…, criterion=…), or name its file on the command line: file.py:function."
            ) from None
    return _function(sys.modules[module], name, reference)


def resolve_loaded(reference: str) -> Callable:
    """Return the function without importing its module, unless that belongs to m2f_lab.

    Raises:
        ValueError: the module is not imported yet, or see `resolve`.
    """
    module, name = _split(reference)
    if f"{module}.".startswith(f"{_PACKAGE}."):
        return resolve(reference)
    if module not in sys.modules:
        raise ValueError(
            f"The module {module!r} is not imported, and no code named in a file is imported by itself. Import it "
            f"first, or pass the function: build={name} (on the command line --build file.py:{name})."
        )
    return _function(sys.modules[module], name, reference)


def resolve_file(reference: str) -> Callable:
    """Return the function named "file.py:function" or "module:function"; modules in the current folder are found, too.

    The file becomes the module named like it, and its folder is searched for what it imports, as if Python ran it.

    Raises:
        ValueError: there is no such file, another module of its name is imported already, or see `resolve`.
    """
    path, _, name = reference.rpartition(":")
    if not path.endswith(".py"):
        _search(Path.cwd())
        return resolve(reference)
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"There is no file {path} for {reference!r}; expected file.py:function.")
    _search(file.parent)
    if file.stem in sys.modules:
        _check_file(file)
    function = resolve(f"{file.stem}:{name}")
    _check_file(file)
    return function


def _check_file(file: Path) -> None:
    loaded_from = getattr(sys.modules[file.stem], "__file__", None)
    if loaded_from is None or Path(loaded_from).resolve() != file:
        raise ValueError(f"{file} cannot be imported: another module {file.stem!r} is. Give the file another name.")


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _split(reference: str) -> tuple[str, str]:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(f'{reference!r} names no function; expected "package.module:function".')
    if match["module"].partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{reference!r} is in Python's standard library; name a function of your own or of m2f_lab.")
    return match["module"], match["function"]


def _function(module: ModuleType, name: str, reference: str) -> Callable:
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"The module {module.__name__!r} has no {name!r}, which {reference!r} names.")
    if not _is_plain(function):
        raise ValueError(
            f"{reference!r} is of type {type(function).__name__}; expected a plain Python function or a class."
        )
    if not f"{function.__module__}.".startswith(f"{module.__name__}."):
        raise ValueError(f"{reference!r} is defined in {function.__module__}; name it there.")
    return function


def _is_plain(function: object) -> bool:
    return inspect.isfunction(function) or inspect.isclass(function)
