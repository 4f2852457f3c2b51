"""A run folder is new, or belongs to the same job."""

import pytest

from base.errors import ConfigError
from base.run_folder import folder as run_folder
from base.run_folder.environment import belongs_to_this_job, record_environment


def create_run_folder(*place):
    with run_folder.create(*place) as folder:
        return folder


def test_run_folders_are_new_and_never_shared(tmp_path):
    first, second = (create_run_folder(str(tmp_path), "name") for _ in range(2))
    assert first != second
    assert first.parent == second.parent == tmp_path / "name"
    named = create_run_folder("unused", "name", str(tmp_path / "given"))
    assert named == tmp_path / "given"
    (named / "config.json").touch()
    with pytest.raises(ConfigError, match="holds a run without a checkpoint; remove it"):
        create_run_folder("unused", "name", str(named))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="save_dir: .*: the run folder cannot be made or written"):
        create_run_folder(str(tmp_path / "file"), "name")


@pytest.mark.parametrize("place", [("link", "name"), ("unused", "name", "link")])
def test_a_link_to_a_missing_folder_is_named(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(ConfigError, match="link is a link to gone, where there is no folder$"):
        create_run_folder(*place)


def test_attempts_of_one_job_share_a_run_folder(tmp_path, monkeypatch):
    folder = create_run_folder("unused", "name", str(tmp_path / "run"))
    (folder / "config.json").touch()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    # Made without torchrun
    assert not belongs_to_this_job(folder)
    folder = create_run_folder("unused", "name", str(tmp_path / "given"))
    (folder / "config.json").touch()
    assert belongs_to_this_job(folder)
    # Died before its first checkpoint
    assert create_run_folder("unused", "name", str(folder)) == folder
    record_environment(folder, resumed=False)
    record_environment(folder, resumed=True)
    assert belongs_to_this_job(folder)
    for name in ("8", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert not belongs_to_this_job(folder)
        with pytest.raises(ConfigError, match="holds a run without a checkpoint"):
            create_run_folder("unused", "name", str(folder))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    (folder / "model_last.pth").touch()
    # train.py resumes it instead
    with pytest.raises(ConfigError, match="already holds a run"):
        create_run_folder("unused", "name", str(folder))
