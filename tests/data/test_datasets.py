"""An adapter is found by its name, and what it cannot be made of is named."""

import pickle

import pytest

from sft.core.errors import UserError
from sft.data.datasets import Adapter, adapter_names


@pytest.mark.parametrize(
    ("name", "path", "options", "expected"),
    [
        ("mesages", ".", {}, "unknown dataset 'mesages'; did you mean 'messages'?"),
        ("messages", None, {}, "dataset 'messages': needs `path`"),
        ("messages", "nowhere.jsonl", {}, "dataset 'messages': path nowhere.jsonl does not exist$"),
        ("messages", "raw/mydata", {}, "dataset 'messages': path raw/mydata does not exist$"),  # no `owner/name`
        ("messages", "owner/name.jsonl", {}, "dataset 'messages': path owner/name.jsonl does not exist$"),
        ("m3it", "raw/m3it", {}, "path raw/m3it does not exist; docs/data.md#m3it has the command that downloads it"),
        (
            "messages",
            ".",
            {"from": 1},
            r"dataset 'messages': unknown option 'from' \(known: image_folder, columns, train_on\)",
        ),
        ("easy_vqa", None, {"frm": 1}, "dataset 'easy_vqa': unknown option 'frm'; did you mean 'form'?"),
        ("no.such", ".", {}, "dataset 'no.such': no such module can be imported"),
        ("os.path", ".", {}, "dataset 'os.path': the module has no function 'rows'"),
    ],
)
def test_what_an_adapter_cannot_be_made_of_is_named(name, path, options, expected):
    with pytest.raises(UserError, match=expected.replace("?", r"\?")):
        Adapter(name, path, "train", options)


def test_options_have_types():
    with pytest.raises(UserError, match="option image_folder is 7; expected a valid string"):
        Adapter("messages", ".", "train", {"image_folder": 7})
    with pytest.raises(UserError, match="option seed is '0'; expected a valid integer"):
        Adapter("easy_vqa", None, "train", {"seed": "0"})


def test_what_is_read_beside_a_file_belongs_to_the_raw_files(tmp_path):
    for name in ("SD_instructions.json", "SD.json"):
        (tmp_path / name).write_text("{}")
    adapter = Adapter("spot_the_difference", str(tmp_path), "train", {})
    assert [file.name for file in adapter.files()] == ["SD_instructions.json"]
    assert [file.name for file in adapter.all_files()] == ["SD_instructions.json", "SD.json"]


def test_an_adapter_travels_to_other_processes():
    adapter = Adapter("easy_vqa", None, "train", {"form": "captions"})
    again = pickle.loads(pickle.dumps(adapter))
    assert (again.name, again.path, again.split, again.options) == (
        adapter.name,
        adapter.path,
        "train",
        adapter.options,
    )


@pytest.mark.parametrize("name", adapter_names())
def test_every_adapter_states_a_licence(name):
    assert Adapter(name, ".", "train", {}).licence != "not stated"


def test_a_module_of_your_own_is_an_adapter(tmp_path, monkeypatch):
    (tmp_path / "poets").mkdir()
    (tmp_path / "poets" / "haiku.py").write_text(
        "from sft.core.sample import Message, Sample\n"
        "def rows(path, split, *, number=1):\n"
        "    return [{'line': f'{split} {n}'} for n in range(number)]\n"
        "def to_sample(row, path, *, title='Haiku'):\n"
        "    return Sample(key=row['line'], messages=(Message(role='document', content=(title, row['line'])),))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    adapter = Adapter("poets.haiku", str(tmp_path), "spring", {"number": 2, "title": "Frog"})
    assert adapter.files() == [tmp_path], "without files() it is the path"
    samples = [adapter.to_sample(row) for row in adapter.rows(tmp_path)]
    assert [sample.messages[0].content for sample in samples] == [("Frog", "spring 0"), ("Frog", "spring 1")]
