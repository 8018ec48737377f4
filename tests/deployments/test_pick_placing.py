"""Deployments come into place whole or not at all."""

import pytest

from tests.deployments.conftest import contents
from vgid.errors import InputError
from vgid.placing import staged

NAMES = ("tiny", "tiny.yaml")


def fill(folder, text):
    (folder / "tiny" / "adapter").mkdir(parents=True)
    (folder / "tiny" / "adapter" / "weights").write_text(text)
    (folder / "tiny.yaml").write_text(text)


@pytest.fixture
def deployments(tmp_path):
    with staged(tmp_path / "deployments", NAMES) as staging:
        fill(staging, "first")
    return tmp_path / "deployments"


def test_the_first_comes_into_place_and_the_next_replaces_it(deployments):
    first = contents(deployments)
    assert {first[name] for name in ("tiny.yaml", "tiny/adapter/weights")} == {b"first"}
    with staged(deployments, NAMES) as staging:
        fill(staging, "second")
        assert contents(deployments / "tiny") == {"adapter/weights": b"first"}
    second = contents(deployments)
    assert second.keys() == first.keys()
    assert {second[name] for name in ("tiny.yaml", "tiny/adapter/weights")} == {b"second"}


def test_what_fails_changes_nothing(deployments):
    before = contents(deployments)
    with pytest.raises(KeyboardInterrupt), staged(deployments, NAMES) as staging:
        fill(staging, "second")
        raise KeyboardInterrupt
    assert contents(deployments) == before
    with pytest.raises(InputError), staged(deployments, NAMES) as staging:
        fill(staging, "second")
        (staging / "tiny.yaml").unlink()  # so that moving breaks off in the middle
    assert contents(deployments) == before


def test_what_fails_at_first_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="stop"), staged(tmp_path / "new", NAMES):
        raise ValueError("stop")
    assert not (tmp_path / "new").exists()


def test_two_at_once_are_refused(deployments):
    with staged(deployments, NAMES) as staging:
        fill(staging, "second")
        with pytest.raises(InputError, match="another pick"), staged(deployments, NAMES):
            pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output"), staged(tmp_path / "file" / "x", NAMES):
        pass
