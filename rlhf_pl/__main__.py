"""The `rlhf-pl` command: a thin dispatcher, so that `--help` imports nothing heavy."""

import os
import sys
from collections.abc import Sequence

HELP = """\
usage: rlhf-pl COMMAND [options]

RLHF on PyTorch Lightning: improve a chat model with REBEL, round after round.

commands:
  fit      train; `rlhf-pl fit --help` lists its options, `--help_all` Lightning's too
  plan     estimate memory and time of a config, without loading weights
  score    score a file of conversations, or of preference pairs, with a reward
  rounds   show the contents of a run directory: `rlhf-pl rounds RUN_DIR`
  compare  compare two runs on their held-out prompts: `rlhf-pl compare RUN_A RUN_B`

A first run, from the repository:  rlhf-pl fit --config configs/quickstart.yaml
The shortest config names a policy, prompts and a reward:
  rlhf-pl fit --model.policy MODEL --data.prompts FILE --rollout.reward package.module.function

options:
  -h, --help     show this message
  --version      show the version
  --traceback    with any command: show where in the code a wrong input was detected, before the message
"""


TRACEBACK = "--traceback"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit code: 0, 1 for a wrong input, 2 for a wrong command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    argv = [argument for argument in given if argument != TRACEBACK]
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if argv[0] == "--version":
        from rlhf_pl import __version__

        print(f"rlhf-pl {__version__}")
        return 0
    from rlhf_pl.utils.terminal import guarded_terminal, print_error, show_tracebacks

    show_tracebacks(TRACEBACK in given)
    with guarded_terminal(argv):
        if argv[0] in ("fit", "plan", "score", "rounds", "compare"):
            return _run(argv)
        print_error(f"unknown command {argv[0]!r}. `rlhf-pl --help` lists the commands.")
        return 2


def _run(argv: list[str]) -> int:
    if argv[0] == "rounds":
        from rlhf_pl.cli import rounds as inspect_rounds

        return inspect_rounds.run(argv[1:])
    if argv[0] == "compare":
        from rlhf_pl.cli import compare

        return compare.run(argv[1:])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    return _with_one_error(argv)


def _with_one_error(argv: list[str]) -> int:
    """Run a command that loads models. A wrong input ends it with one message."""
    from rlhf_pl.cli import lightning_workarounds as cli_lightning_workarounds
    from rlhf_pl.cli.quiet import quiet_libraries
    from rlhf_pl.cli.user_errors import LibraryError, find_early_exit, find_user_error
    from rlhf_pl.utils.memory import bound_kernel_caches
    from rlhf_pl.utils.public_names import with_public_path
    from rlhf_pl.utils.terminal import print_error, print_traceback, print_wrong_input, shows_tracebacks

    quiet_libraries()
    bound_kernel_caches()
    argv = [argv[0], *map(with_public_path, argv[1:])]
    cli_lightning_workarounds.install()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # users' rewards and classes are in the folder that they run the command in
    try:
        if argv[0] == "score":
            from rlhf_pl.cli import score as score_command

            return score_command.run(argv[1:])
        if argv[0] == "plan":
            from rlhf_pl.cli import plan as plan_command

            return plan_command.run(argv[1:])
        from rlhf_pl.cli import fit as cli

        return cli.run(argv)
    except SystemExit as stop:
        if (where := find_early_exit(stop)) is None:
            raise
        print_error(
            f"sys.exit({stop.code or 0}) was called in {where}, before this command had finished. Rewards, callbacks "
            "and other code that a run calls must return or raise an ordinary exception."
        )
        return 1
    except Exception as error:
        wrong = find_user_error(error)
        if wrong is None:
            raise
        if not getattr(wrong, "reported", False):  # by rank 0 of a run of several processes
            print_wrong_input(error, wrong)
            if isinstance(wrong, LibraryError) and not shows_tracebacks():
                print(f"`{TRACEBACK}` shows where it was raised.", file=sys.stderr)
        elif shows_tracebacks():
            print_traceback(error)
        return 1


def command() -> None:
    """Run the command and end the process, even if rewards have left threads or processes running."""
    status: int | str | None = 1
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
        raise
    finally:
        if process_exit := sys.modules.get("rlhf_pl.rewards.process_exit"):  # if a reward was there
            process_exit.exit_despite_leftovers(status if isinstance(status, int) else int(status is not None))
    sys.exit(status)


if __name__ == "__main__":
    command()
