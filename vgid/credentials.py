"""Addresses without the secrets that they may carry."""

import re

# To the last @, since a password may hold some itself; three slashes begin a path.
_USER = re.compile(r"(?<=://)(?!/)\S*@")
_PARAMETER = re.compile(r"(?i)([?&][^=&\s]*(?:passw|pwd|token|secret)[^=&\s]*=)[^&\s]*")


def without_credentials(text: str) -> str:
    """An address, or a message that holds some, without user, password and secret parameters."""
    return _PARAMETER.sub(r"\1***", _USER.sub("", text))
