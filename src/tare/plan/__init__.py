"""Plan: named models, predicted and measured memory, and the search for what fits. `tare.plan(...)` is `tare.plan.api.plan`.

`tare.plan` has to be this package (for `from tare.plan.models import ...`) and a function (the public name), so the module itself is
callable: Python allows a module's class to be replaced by a subclass. Nothing heavy is imported until it is called.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tare.plan.api import Plan


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> "Plan":
        from tare.plan.api import plan

        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
