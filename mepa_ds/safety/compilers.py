"""Where compilers keep what they have made, and read it again to run it: in a directory of this user's alone.

PyTorch's default is `/tmp/torchinductor_<user>`, whoever has made that directory.
"""

from __future__ import annotations

import os

from mepa_ds.safety.places import user_directory

_PLACES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "extensions",
}
"""Variables of Inductor, Triton, and PyTorch's and DeepSpeed's C++ extensions, and our names for what they hold."""


def keep_compiled_code_private() -> None:
    """To be called before anything is compiled. A variable that the user has set stays as it is.

    Raises:
        UserError: another user has made the directory.
    """
    for variable, name in _PLACES.items():
        if not os.environ.get(variable):
            os.environ[variable] = str(user_directory(name))
