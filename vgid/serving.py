"""Models that were registered before ``vgid.deployment.pyfunc`` had its name ask for this one."""

from vgid.deployment.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
