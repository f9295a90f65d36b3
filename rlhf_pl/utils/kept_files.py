"""What a run directory holds, and how large it is."""

from pathlib import Path

from rlhf_pl.utils.disk import format_bytes


def describe_kept(run_dir: str | Path) -> str:
    """One line with the size of a run directory and its largest parts; empty where it holds nothing."""
    parts = describe_parts(run_dir)
    return f"Kept in {run_dir}: {parts}." if parts else ""


def describe_parts(run_dir: str | Path) -> str:
    """Size of a run directory and its largest parts, such as `4.0 MiB (checkpoints 3.0 MiB)`; empty for nothing.

    Links are not counted. Sizes are those of the files' contents, bytes.
    """
    sizes: dict[str, int] = {}
    for file in Path(run_dir).rglob("*"):
        try:
            if file.is_file() and not file.is_symlink():
                part = file.relative_to(run_dir).parts[0]
                sizes[part] = sizes.get(part, 0) + file.stat().st_size
        except FileNotFoundError:  # a temporary file that was renamed meanwhile
            continue
    if not (total := sum(sizes.values())):
        return ""
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest if size >= total / 100)
    return f"{format_bytes(total)} ({parts})"
