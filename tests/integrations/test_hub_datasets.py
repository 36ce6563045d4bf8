"""`load_images`: where data comes from, which columns, which labels, which splits."""

from pathlib import Path

import datasets
import pytest
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image

from entprop_wrap.errors import ConfigurationError, DataError, LabelError
from entprop_wrap.integrations.hub_datasets import load_images
from entprop_wrap.integrations.hub_datasets.sources import read_class_folders
from tests.helpers.image_samples import encoded, folder, picture, shades, table, truncated

NAMES = ["cat", "dog"]
LABELS = [0, 1] * 5


def pair(train: datasets.Dataset, **others: datasets.Dataset) -> datasets.DatasetDict:
    return datasets.DatasetDict(train=train, **others)


# --- sources


def test_hub_ids_reach_load_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return pair(table(LABELS, NAMES), test=table(LABELS, NAMES))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_images("someone/pets", name="small", revision="main", token=True)
    assert calls == [(("someone/pets",), {"name": "small", "revision": "main", "token": True})]
    assert data.classes == ("cat", "dog")


@pytest.mark.parametrize("split", [True, False])
def test_saved_to_disk(tmp_path, split):
    rows = table(LABELS, NAMES)
    (pair(rows, test=rows) if split else rows).save_to_disk(tmp_path / "saved")
    data = load_images(tmp_path / "saved")
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.eval)) == ((10, 10) if split else (8, 2))


def test_parquet_through_its_builder_and_from_a_folder(tmp_path):
    file = tmp_path / "rows" / "train.parquet"
    table(LABELS, NAMES).to_parquet(file)
    cache = {"cache_dir": str(tmp_path / "cache")}
    for data in (load_images("parquet", data_files={"train": str(file)}, **cache), load_images(file.parent, **cache)):
        assert (data.classes, len(data.train), len(data.eval)) == (("cat", "dog"), 8, 2)


def test_image_folder_without_splits(tmp_path):
    root = folder(tmp_path, {"zebra/deep": 5, "ant": 5, ".hidden": 3})
    (root / "ant" / "0.png").rename(root / "ant" / "0.jfif")
    data = load_images(root)
    assert data.classes == ("ant", "zebra")
    assert torch.bincount(data.train.labels).tolist() == [4, 4]
    assert torch.bincount(data.eval.labels).tolist() == [1, 1]
    first, _ = load_images(tmp_path).train[0]
    assert first.mode == "RGB"


@pytest.mark.parametrize("name", ["val", "Test"])
def test_image_folder_with_splits(tmp_path, name):
    root = folder(tmp_path, {"train/a": 2, "train/b": 3, "train/c": 1, f"{name}/a": 1, f"{name}/c": 2})
    (root / "train" / "a" / "notes.txt").write_text("no image")
    data = load_images(root)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert data.eval.labels.tolist() == [0, 2, 2], "a class missing from evaluation must not move the others"
    assert data.classes == ("a", "b", "c")


def test_a_class_called_train_is_a_class(tmp_path):
    data = load_images(folder(tmp_path, {"train": 4, "car": 4, "test": 4}))
    assert data.classes == ("car", "test", "train")


def test_unlabelled_test_folder_is_not_used(tmp_path):
    data = load_images(folder(tmp_path, {"train/a": 4, "train/b": 4, "test": 3}))
    assert len(data.eval) == 2
    assert any("'test' is not used: it has no column 'label'" in note for note in data.notes)


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"train/a": 2, "train/b": 2, "test/a": 1, "test/cow": 1}, LabelError, "found 'cow'"),
        ({"train": 3, "test": 3}, DataError, "Expected a column of labels"),
        ({"data/a": 2, "data/b": 2}, DataError, "the folder that holds them directly"),
    ],
)
def test_folders_that_cannot_serve(tree, error, message, tmp_path):
    with pytest.raises(error, match=message):
        load_images(folder(tmp_path, tree))


ROWS = table(LABELS, NAMES)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("/no/such/folder", {}, DataError, "is not a folder"),
        (torch.utils.data.TensorDataset(torch.zeros(1)), {}, DataError, "found TensorDataset"),
        ({"train": [1, 2]}, {}, DataError, "'train': 'list'"),
        ({"train": ROWS.to_iterable_dataset(), "test": ROWS}, {}, DataError, "Streams and torch datasets need no"),
        (ROWS, {"revision": "x"}, ConfigurationError, "'revision': 'x'"),
        (ROWS, {"on_broken": "ignore"}, ConfigurationError, "on_broken must be 'skip' or 'raise'"),
        (ROWS, {"eval_fraction": 1.0}, ConfigurationError, "eval_fraction must be .* between 0 and 1"),
        (ROWS, {"max_train": 0}, ConfigurationError, "max_train"),
    ],
)
def test_wrong_sources_and_options(source, options, error, message):
    with pytest.raises(error, match=message):
        load_images(source, **options)


def test_a_table_that_is_not_read_is_named(tmp_path):
    root = folder(tmp_path / "one", {"img": 6})
    (root / "train.csv").write_text("file_path,label\nimg/0.png,cat\n")
    with pytest.raises(DataError, match=r"found 'img'.*metadata.csv with the columns file_name and label"):
        load_images(root)
    root = folder(tmp_path / "two", {"cat": 4, "dog": 4})
    (root / "scores.csv").write_text("a,b\n1,2\n")
    assert any("not read: 'scores.csv'" in note for note in load_images(root).notes)


@pytest.mark.parametrize(
    ("tree", "left"),
    [
        ({"cat": 4, "dog": 4, ".": 3}, "3 of 11"),
        ({"train/cat": 4, "train/dog": 4, "more": 2}, "2 of 10"),
        ({"cat": 4, "dog": 4}, None),
    ],
    ids=["beside classes", "beside splits", "none"],
)
def test_images_that_are_left_out_are_counted(tmp_path, tree, left):
    notes = [note for note in load_images(folder(tmp_path, tree)).notes if "are left out" in note]
    assert [note.partition(" images are left out")[0] for note in notes] == ([left] if left else [])


@pytest.mark.parametrize("names", [["dog", "eel"], ["eel", "cat", "dog"]], ids=["fewer", "another order"])
def test_parquet_files_that_name_classes_differently_are_refused(tmp_path, names):
    shades = {"cat": 20, "dog": 120, "eel": 220}

    def write(file, classes):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        pictures = [Image.new("RGB", (8, 8), (shades[name],) * 3) for name in classes]
        labels = list(range(len(classes)))
        rows = datasets.Dataset.from_dict({"image": pictures * 2, "label": labels * 2}, features=features)
        rows.to_parquet(tmp_path / file)
        return datasets.Dataset.from_parquet(str(tmp_path / file), cache_dir=str(tmp_path / "cache"))

    train, test = write("train.parquet", ["cat", "dog", "eel"]), write("test.parquet", names)
    with pytest.raises(DataError, match=r"name the classes of 'label' differently.*Read each by itself"):
        load_images(tmp_path)
    data = load_images({"train": train, "test": test})  # what the message says to write
    assert all(image.getpixel((0, 0))[0] == shades[data.classes[label]] for image, label in data.eval)


def test_integers_beside_names_are_told_to_get_them():
    with pytest.raises(LabelError, match=r"integers, where classes have names .*datasets\.ClassLabel"):
        load_images(pair(table(["a", "b", "c"]), test=table([0, 1, 2])))
    with pytest.raises(DataError, match="all names or all integers"):
        load_images(pair(table(["a", "b"]), test=table([0, 1])), classes=["a", "b", 0, 1])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_metadata_table_wins_over_class_folders(tmp_path, suffix):
    root = folder(tmp_path / "set", {"img": 3, "more": 3})
    names = [f"{place}/{index}.png" for place in ("img", "more") for index in range(3)]
    rows = datasets.Dataset.from_dict({"file_name": names, "label": ["cat", "dog"] * 3})
    {"csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](root / f"metadata.{suffix}")
    if f"metadata.{suffix}" not in ImageFolder.METADATA_FILENAMES:  # an older version of datasets
        assert f"not read: 'metadata.{suffix}'" in " ".join(load_images(root).notes)
        return
    data = load_images(root, cache_dir=str(tmp_path / "cache"))
    assert data.classes == ("cat", "dog")
    assert len(data.train) == 4
    assert not any("names of folders" in note for note in data.notes)


def test_class_folders_are_named(tmp_path, caplog):
    data = load_images(folder(tmp_path, {"images": 4, "annotations/trimaps": 4}))
    assert data.notes[0] == "the 2 classes are the names of folders: 'annotations', 'images'"
    assert data.notes[0] in caplog.text


def test_folders_are_read_in_the_order_of_names(tmp_path):
    root = folder(tmp_path, {"b": 2, "a": 2})
    (root / "a" / "broken.jpg").write_bytes(truncated())
    rows = read_class_folders(root, [])["train"].cast_column("image", datasets.Image(decode=False))
    found = [Path(cell["path"]).relative_to(root).as_posix() for cell in rows["image"]]
    assert found == ["a/0.png", "a/1.png", "a/broken.jpg", "b/0.png", "b/1.png"]


# --- columns


def renamed(rows=ROWS, **names: str) -> datasets.Dataset:
    return rows.rename_columns(names)


def cifar100() -> datasets.Dataset:
    rows = renamed(label="fine_label", image="img").add_column("coarse_label", LABELS)
    return rows.cast_column("coarse_label", datasets.ClassLabel(names=["animal", "plant"]))


def two_images() -> datasets.Dataset:
    rows = renamed(image="left").add_column("right", [{"bytes": encoded(picture(9)), "path": None}] * 10)
    return rows.cast_column("right", datasets.Image())


PUGS, BYTES = table(["pug", "poodle"] * 5), [encoded(picture(row)) for row in range(10)]
FOUND = [
    (renamed(image="scan", label="diagnosis").add_column("age", list(range(10))), {}, ("cat", "dog")),
    (datasets.Dataset.from_dict({"img": BYTES, "class": LABELS}), {}, ("0", "1")),
    (datasets.Dataset.from_dict({"Image": BYTES, "Label": LABELS}), {}, ("0", "1")),
    (renamed(table(["a", "b"] * 5), label="Label").add_column("Class", LABELS), {}, ("a", "b")),
    (renamed(PUGS, label="breed"), {"label_column": "breed"}, ("poodle", "pug")),
    (cifar100(), {"label_column": "coarse_label"}, ("animal", "plant")),
    (renamed(cifar100(), fine_label="label"), {}, ("cat", "dog")),
    (two_images(), {"image_column": "right"}, ("cat", "dog")),
]


@pytest.mark.parametrize(("rows", "options", "classes"), FOUND)
def test_columns_are_found_by_type_and_by_usual_names(rows, options, classes):
    data = load_images(rows, **options)
    assert data.classes == classes
    assert set(shades(data.train)) | set(shades(data.eval)) == ({9} if options.get("image_column") else {*range(10)})


def test_paths_are_read(tmp_path):
    folder(tmp_path, {".": 10})
    paths = [str(tmp_path / f"{index}.png") for index in range(10)]
    data = load_images(datasets.Dataset.from_dict({"img_path": paths, "species": ["x"] * 10, "target": ["a", "b"] * 5}))
    assert data.classes == ("a", "b")
    assert len(shades(data.train)) == 8


UNCLEAR = [
    (renamed(table(LABELS), label="Target").add_column("Category", LABELS), {}, "='Target' or label_column='Category'"),
    (renamed(PUGS, label="breed"), {}, r"Expected a column of labels.*'breed'.*pass another label_column="),
    (cifar100(), {}, "label_column='fine_label' or label_column='coarse_label'"),
    (renamed(label="domain").add_column("class", ["x", "y"] * 5), {}, "label_column='domain' or label_column='class'"),
    (two_images(), {}, "image_column='left' or image_column='right'"),
    (table(LABELS).remove_columns("label"), {}, "Expected a column of labels .* found columns 'image'"),
    (table(LABELS).remove_columns("image"), {}, r"Expected a column of images .* found columns 'label' \(int64\)"),
    (table(LABELS), {"label_column": "kind"}, "label_column='kind', found columns 'image'"),
    (table(LABELS), {"image_column": "label"}, "images, paths or bytes.* in image_column='label'"),
    (table(LABELS), {"label_column": "image"}, "one class per image"),
    (table([0.5, 1.5]), {}, r"one class per image: text, integers or ClassLabel.* found .*'label' \(float64\)"),
    (table([[0, 1], [1]]), {}, "one class per image"),
    (table([]), {}, "found none|at least two"),
]


@pytest.mark.parametrize(("rows", "options", "message"), UNCLEAR)
def test_columns_that_cannot_serve_or_are_not_ours_to_guess(rows, options, message):
    with pytest.raises(DataError, match=message):
        load_images(rows, **options)


# --- labels


A, B, C = NAMES3 = ["a", "b", "c"]
MAPPED = [  # training, evaluation, options, classes, their labels
    (table(["dog", "ant", "dog", "cat"]), table(["cat", "cat"]), {}, ("ant", "cat", "dog"), [2, 0, 2, 1], [1, 1]),
    (table([7, 1, 30, 7]), table([30]), {}, ("1", "7", "30"), [1, 0, 2, 1], [2]),
    (table([1, 0, 2]), table([2]), {}, ("0", "1", "2"), [1, 0, 2], [2]),
    (table([0, 1], ["cat", "dog"]), table([0, 1], ["dog", "cat"]), {}, ("cat", "dog"), [0, 1], [1, 0]),
    (table([0, 2], NAMES3), table([1], NAMES3), {}, (A, B, C), [0, 2], [1]),
    (table([A, B]), table([C]), {"classes": [C, B, A]}, (C, B, A), [2, 1], [0]),
    (table([0, 1]), table([1]), {"classes": NAMES}, ("cat", "dog"), [0, 1], [1]),
]


@pytest.mark.parametrize(("train", "test", "options", "classes", "train_labels", "test_labels"), MAPPED)
def test_labels_of_both_splits_have_one_numbering(train, test, options, classes, train_labels, test_labels):
    data = load_images(pair(train, test=test), **options)
    assert data.classes == classes
    assert data.train.labels.tolist() == train_labels
    assert data.eval.labels.tolist() == test_labels
    assert data.id2label == dict(enumerate(classes))
    assert {data.label2id[name]: name for name in classes} == data.id2label


def test_what_was_decided_about_labels_is_said(caplog):
    assert load_images(pair(table([1, 0, 2]), test=table([2, 1, 0]))).notes == ()
    load_images(pair(table([7, 1, 30, 7]), test=table([30])))
    assert "labels 1, 7, 30 were renumbered 0..2 in this order" in caplog.text
    load_images(pair(table([0, 2], NAMES3), test=table([1], NAMES3)))
    assert "1 of the 3 declared classes have no training image: 'b'" in caplog.text


LABEL_ERRORS = [
    (pair(table([A, B]), test=table([A, "cow"])), {}, LabelError, r"in split 'test', found 'cow'"),
    (pair(table([0, 1]), test=table([5])), {}, LabelError, "found '5'"),
    (table([A, B]), {"classes": [A, A]}, DataError, "every one once"),
    (table([0, -1, 1], NAMES), {}, LabelError, r"split 'train', found 1 of 3 without one .*dataset.filter"),
    (pair(table([A, B]), test=table([A, None])), {}, LabelError, "split 'test', found 1 of 2 without one"),
    (table([-1, 0, 1, 2] * 3), {}, LabelError, "often means 'unlabelled'"),
    (pair(ROWS, test=table([-1] * 4, NAMES)), {"eval_split": "test"}, DataError, "found a split that has no labels"),
    (table([0, 1, 2]), {}, DataError, "found one image of each class.*pass eval_split"),
]


@pytest.mark.parametrize(("rows", "options", "error", "message"), LABEL_ERRORS)
def test_labels_that_cannot_serve(rows, options, error, message):
    with pytest.raises(error, match=message):
        load_images(rows, **options)
    assert load_images(table([-1, 1] * 3)).classes == ("-1", "1"), "a sign is a label"


@pytest.mark.parametrize("names", [NAMES, None])
def test_unlabelled_test_split_is_treated_as_missing(names):
    data = load_images(pair(table(LABELS, names), test=table([-1] * 4, names)))
    assert len(data.eval) == 2
    assert "'test' is not used: it has no labels" in data.notes[0]
    assert any("held out" in note for note in data.notes)


# --- splits


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("training", "val", "test"), ("Train", "dev", "t")])
def test_validation_comes_before_test(names):
    rows = {name: table(LABELS[: 4 + 2 * index], NAMES) for index, name in enumerate(names)}
    data = load_images(datasets.DatasetDict(rows))
    assert (len(data.train), len(data.eval)) == (4, 6)
    if "test" in rows:
        assert data.notes == (f"evaluating on split '{names[1]}'; 'test' not touched (eval_split=... names another)",)
        assert len(load_images(datasets.DatasetDict(rows), eval_split="test").eval) == 8


def test_a_missing_split_is_cut_seeded_and_stratified(caplog):
    labels = [0] * 50 + [1] * 20 + [2] * 2 + [3]
    rows = table(labels)
    data = load_images(rows, seed=1, eval_fraction=0.1)
    assert torch.bincount(data.eval.labels, minlength=4).tolist() == [5, 2, 1, 0]
    assert torch.bincount(data.train.labels).tolist() == [45, 18, 1, 1], "a single image stays in training"
    train, evaluate = shades(data.train), shades(data.eval)
    assert sorted(train + evaluate) == list(range(73))
    assert train == sorted(train)
    assert evaluate == sorted(evaluate)
    assert [labels[row] for row in evaluate] == data.eval.labels.tolist()
    assert shades(load_images(rows, seed=1, eval_fraction=0.1).eval) == evaluate
    assert shades(load_images(rows, seed=2, eval_fraction=0.1).eval) != evaluate
    assert any("8 of the 73 images of split 'train' are held out, 10% of every class, seed 1" in n for n in data.notes)
    assert any("held out" in message for message in caplog.messages)


def test_splits_of_other_names():
    assert len(load_images(datasets.DatasetDict(test=table(LABELS, NAMES))).train) == 8
    rows = pair(table(LABELS, NAMES), extra=table(LABELS[:6], NAMES))
    data = load_images(rows, train_split="extra", eval_split="train")
    assert (len(data.train), len(data.eval)) == (6, 10)
    with pytest.raises(DataError, match=r"called 'train', found \['fold0', 'fold1'\]"):
        load_images(datasets.DatasetDict(fold0=table(LABELS), fold1=table(LABELS)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_split": "train", "eval_split": "train"}, ConfigurationError, "Expected two splits"),
        ({"train_split": "tran"}, DataError, r"\['train', 'extra'\], found train_split='tran'"),
        ({"eval_split": "train[:50%]"}, DataError, r"found eval_split='train\[:50%\]'.*DatasetDict"),
    ],
)
def test_splits_that_cannot_serve(options, error, message):
    with pytest.raises(error, match=message):
        load_images(pair(table(LABELS, NAMES), extra=table(LABELS, NAMES)), **options)


def test_limits_keep_every_class_and_the_order():
    labels = [0] * 60 + [1] * 30 + [2] * 2
    data = load_images(pair(table(labels), test=table(labels)), max_train=20, max_eval=3)
    counts = torch.bincount(data.train.labels).tolist()
    assert sum(counts) == len(data.train) == 20
    assert counts[2] == 1
    assert 11 <= counts[0] <= 14
    assert sorted(data.eval.labels.tolist()) == [0, 1, 2]
    rows = shades(data.train)
    assert rows == sorted(rows)
    assert set(rows) <= set(shades(load_images(pair(table(labels), test=table(labels)), max_train=30).train))
    assert "20 of the 92 images of split 'train' are used, every class in proportion" in data.notes
