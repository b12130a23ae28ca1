"""Texts: which bytes go where, and what is refused."""

import pytest

from fxsparse.core.errors import ConfigError, DataError
from fxsparse.training.data import is_text, load_text


@pytest.fixture
def twenty(tmp_path):
    """A text whose bytes are 0 to 19."""
    path = tmp_path / "twenty.bin"
    path.write_bytes(bytes(range(20)))
    return path


@pytest.mark.parametrize(
    ("shares", "ends"),
    [((0.8, 0.1, 0.1), (16, 18)), ((0.5, 0.0, 0.5), (10, 10)), ((0.33, 0.33, 0.34), (7, 13))],
)
def test_parts_are_contiguous_and_are_the_whole(twenty, shares, ends):
    splits = load_text(f"text:{twenty}", shares)
    assert splits.train.tolist() == list(range(ends[0]))
    assert splits.test.tolist() == list(range(ends[1], 20))
    if shares[1]:
        assert splits.validation.tolist() == list(range(*ends))
    else:
        assert splits.validation is None


def test_every_byte_is_a_character(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(256)) * 2 + "Größe\r\n".encode())
    splits = load_text(f"text:{path}", (0.98, 0.01, 0.01))
    whole = splits.train.tolist() + splits.validation.tolist() + splits.test.tolist()
    assert bytes(whole) == path.read_bytes()


def test_the_home_folder_is_known(twenty, monkeypatch):
    monkeypatch.setenv("HOME", str(twenty.parent))
    assert len(load_text("text:~/twenty.bin", (0.8, 0.1, 0.1)).train) == 16


def test_what_is_no_text_is_one_line(twenty):
    folder = twenty.parent
    (folder / "empty").touch()
    (folder / "short").write_bytes(b"abcdefghij")
    for name, error, told in [
        (f"text:{folder}/nowhere", DataError, "there is no text .*nowhere"),
        (f"text:{folder}", DataError, "is a folder; text:PATH takes one file"),
        (f"text:{twenty}/below", DataError, "twenty.bin/below cannot be read: Not a directory"),
        (f"text:{folder}/empty", DataError, "empty is empty"),
        (f"text:{folder}/short", DataError, "short is too short: 10 bytes leave 1 to the validation part"),
        ("text:", ConfigError, "text:PATH"),
        ("text", ConfigError, "text:PATH"),
    ]:
        with pytest.raises(error, match=told) as caught:
            load_text(name, (0.8, 0.1, 0.1))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shares", [(0.9, 0.1), (0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (1.1, -0.2, 0.1), ()]
)
def test_shares_that_are_none_are_refused(twenty, shares):
    with pytest.raises(ConfigError, match=r"split is .*; it takes the shares"):
        load_text(f"text:{twenty}", shares)


def test_which_names_are_texts():
    assert [is_text(name) for name in ("text:a", "text", "digits", "imagefolder:text")] == [True, True, False, False]
