"""Names: how a class or function is told to another process, and found there.

"package.module:Class.inner". What stands in a program's own script (`__main__`) is found there by running the script again under another
name, as `multiprocessing` does it: the script must keep what it starts behind `if __name__ == "__main__":`.
"""

import sys
from functools import reduce
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Final

from isopod.world.errors import InvalidArgument, NotFound

MAIN: Final = "__main__"
MAIN_AGAIN: Final = "__isopod_main__"
"""What `__name__` is in a script that a shard runs to find something in it."""


def name_of(thing: object) -> str:
    """Return the name of a class or function; a name is returned as it is.

    Raises:
        InvalidArgument: Another process could not find it: a lambda, or something made inside a function.
    """
    if isinstance(thing, str):
        return thing
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if module == MAIN_AGAIN:
        module = MAIN
    if module and name and "<" not in name:
        found = f"{module}:{name}"
        if find(found, main_path()) is thing:
            return found
    raise InvalidArgument("service", thing, "another shard cannot import it", "define it at the top of a module")


def main_path() -> str:
    """Return the file of the program's script, "" if it has none (`python -c`, an interactive session)."""
    module = sys.modules.get(MAIN_AGAIN) or sys.modules.get(MAIN)
    return getattr(module, "__file__", None) or ""


def find(name: str, script: str) -> object:
    """Return what a name means.

    Args:
        name: "package.module:Class".
        script: The file that `__main__` stands for.

    Raises:
        InvalidArgument: It is no such name, or its module cannot be imported.
        NotFound: The module has nothing of that name.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise InvalidArgument("service name", name, 'want "package.module:Class"')
    try:
        module = _main(script) if module_name == MAIN else import_module(module_name)
    except (ImportError, OSError) as error:
        raise InvalidArgument("service name", name, f"cannot import {module_name}: {error}") from error
    try:
        return reduce(getattr, path.split("."), module)
    except AttributeError as error:
        if module_name == MAIN and not script:
            raise InvalidArgument(
                "service name", name, "another shard cannot see it: the program has no script", "put it in a module"
            ) from error
        raise NotFound("service", name) from error


def _main(script: str) -> ModuleType:
    """Return the module of the program's script, run again where it is not this process's own."""
    if MAIN_AGAIN in sys.modules:
        return sys.modules[MAIN_AGAIN]
    own = sys.modules[MAIN]
    if (getattr(own, "__file__", None) or "") == script:
        return own
    spec = spec_from_file_location(MAIN_AGAIN, script)
    if spec is None or spec.loader is None:
        raise ImportError(f"{script!r} is no Python file")
    module = module_from_spec(spec)
    sys.modules[MAIN_AGAIN] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[MAIN_AGAIN]
        raise
    return module
