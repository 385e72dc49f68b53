"""Hydra's own flags that show something: ``--help``, ``--cfg job``, ``--info`` and their like."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence

from harness.compose import compose_config, conf_dir
from harness.schema import register
from harness.sizes import BadValue, printable

SHOWING = ("--help -h --hydra-help --cfg -c --info -i --version --shell-completion -sc").split()


def asked(words: Sequence[str]) -> bool:
    """Whether a command line is Hydra's to answer."""
    return any(word.partition("=")[0] in SHOWING for word in words)


def show(words: Sequence[str]) -> int:
    """Let Hydra answer; returns the exit code.

    Raises
    ------
    BadValue
        For words that it cannot answer, in one line.
    """
    import hydra

    completing = any(word in ("-sc", "--shell-completion") for word in words)
    if not completing:
        compose_config([w for w in words if "=" in w and not w.startswith("-")])
    register()
    code = 0
    out, err = io.StringIO(), io.StringIO()
    own, sys.argv = sys.argv, ["harness", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(
                lambda config: None
            )()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except Exception as error:  # Hydra's own checks of its flags are assertions
        print(error, file=err)
        code = 2
    finally:
        sys.argv = own
    if code:
        said = [line for line in err.getvalue().splitlines() if line.strip()]
        reason = printable(said[-1]) if said else "it cannot be shown"
        raise BadValue(" ".join(words), "", f"{' '.join(SHOWING)} ({reason})")
    # The groups' schemas are no options.
    print(re.sub(r"(, )?\b\w+_schema\b", "", out.getvalue()), end="")
    return 0
