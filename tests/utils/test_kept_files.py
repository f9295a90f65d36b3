"""The line that says what a run directory holds."""

from pathlib import Path

from rlhf_pl.utils.kept_files import describe_kept


def test_sizes_are_summed_by_part_without_links(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/a.ckpt").write_bytes(bytes(3 * 2**20))
    (tmp_path / "checkpoints/last.ckpt").symlink_to("a.ckpt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(bytes(2**20))
    assert describe_kept(tmp_path) == f"Kept in {tmp_path}: 4.0 MiB (checkpoints 3.0 MiB, model 1.0 MiB)."


def test_an_empty_or_missing_directory_gives_no_line(tmp_path: Path) -> None:
    assert describe_kept(tmp_path) == ""
    assert describe_kept(tmp_path / "none") == ""
