"""Makes the package's classes known to diffusers, so that `DiffusionPipeline.from_pretrained` finds them by name."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLES = "diffusers.pipelines.pipeline_loading_utils"
"""The module that holds diffusers' table of libraries to load components from; every loading pipeline imports it."""


def register_with_diffusers(package: str, *, pipelines: tuple[str, ...], models: tuple[str, ...]) -> None:
    """
    Make a package's classes loadable from `model_index.json` by their names, now or as soon as diffusers is imported.

    Nothing is imported here: a class is looked up in the package when diffusers first asks for it. Two things are
    told: `diffusers.<name>` finds the pipelines, which is where diffusers looks `_class_name` up, and the table of
    libraries gets the package beside diffusers and transformers. So components are saved as `["uplift_diffusers",
    "UPLiFTModel"]` rather than with a module path, and a repository that names them can be loaded from the hub.

    Args:
        package: name of an imported package that has the classes as attributes.
        pipelines: names of its `DiffusionPipeline` classes.
        models: names of its `ModelMixin` classes.
    """

    def register(tables: ModuleType) -> None:
        loadable = {name: ["save_pretrained", "from_pretrained"] for name in models}
        tables.LOADABLE_CLASSES[package] = loadable
        tables.ALL_IMPORTABLE_CLASSES.update(loadable)
        _add_attributes(sys.modules["diffusers"], package, pipelines)

    if _TABLES in sys.modules:
        register(sys.modules[_TABLES])
    else:
        sys.meta_path.insert(0, _AfterImport(_TABLES, register))


def _add_attributes(module: ModuleType, package: str, names: tuple[str, ...]) -> None:
    """Let `module` answer for the package's names, by the module-level `__getattr__` of PEP 562."""
    fallback = vars(module).get("__getattr__")

    def find(name: str):
        if name in names:
            return getattr(sys.modules[package], name)
        if fallback is not None:
            return fallback(name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = find


class _AfterImport(MetaPathFinder, Loader):
    """Calls `action` with the module `name` once that is imported, and then stands aside."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name = name
        self.action = action
        self.is_looking = False

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.name or self.is_looking:
            return None
        self.is_looking = True  # the other finders find it
        try:
            self.spec = importlib.util.find_spec(fullname)
        finally:
            self.is_looking = False
        if self.spec is None:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=self.spec.origin)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.util.module_from_spec(self.spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__spec__ = self.spec  # from here on the module is as if nobody had stood in between
        self.spec.loader.exec_module(module)
        self.action(module)
