"""What Python runs first in processes that tests start: DeepSpeed's launchers import no MLflow, which takes seconds."""

import contextlib

with contextlib.suppress(ImportError):  # an environment of its own, without this checkout
    import kvds  # noqa: F401
