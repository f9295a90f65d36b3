"""The `rlhf-pl` command: a thin dispatcher, so that `--help` imports nothing heavy."""

import os
import sys
from collections.abc import Sequence

HELP = """\
usage: rlhf-pl COMMAND [options]

RLHF on PyTorch Lightning: improve a chat model with REBEL, round after round.

commands:
  fit     train; `rlhf-pl fit --help` lists every option, `--print_config` writes a complete config
  rounds  show what a run directory holds: `rlhf-pl rounds RUN_DIR`

A first run, from the repository:  rlhf-pl fit --config configs/quickstart.yaml
The shortest config names a policy, prompts and a reward:
  rlhf-pl fit --model.policy MODEL --data.prompts FILE --rollout.reward package.module.function

options:
  -h, --help     show this message
  --version      show the version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a wrong input, 2 for a wrong command line."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if argv[0] == "--version":
        from rlhf_pl import __version__

        print(f"rlhf-pl {__version__}")
        return 0
    if argv[0] == "rounds":
        from rlhf_pl import inspect_rounds

        return inspect_rounds.run(argv[1:])
    if argv[0] != "fit":
        print(f"error: unknown command {argv[0]!r}. `rlhf-pl --help` lists the commands.", file=sys.stderr)
        return 2
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from rlhf_pl.cli import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
