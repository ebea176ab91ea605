"""Published numbers are found by exactly their setting and epoch, and nobody's numbers are not found at all."""

import pytest

from kdzoo.models import names
from kdzoo.resolve import protocol_names
from kdzoo.results import published
from kdzoo.settings import TeacherSettings

# No run of kdzoo stands beside numbers that were measured with these.
RECIPES_OF_OTHERS = {
    "sskd",
    "norm",
    "nd",
    "skd",
    "mlld 480 epochs",
    "cls_KD",
    "deit 300 epochs",
    "deit 300 epochs, 1 GPU",
    "scalekd",
    "scalekd advanced",
}
NETWORKS_OF_OTHERS = {"beit_l", "deit3_s", "deit_s_distilled", "deit_t_distilled", "mixer_b14", "swin_l", "vit_b14"}

CRD = {"data": "cifar100", "protocol": "crd", "teacher": "resnet32x4", "student": "resnet8x4"}


def test_a_number_comes_with_its_source_and_status():
    found = published.find(**CRD, method="kd", epoch="last")
    assert found == (73.33, None, "RepDistiller README", "read", "")
    assert found.origin == "RepDistiller README (read)"


def test_what_others_could_not_reach_says_so():
    pair = CRD | {"teacher": "wrn_40_2", "student": "wrn_40_1"}
    found = published.find(**pair, method="dkd", epoch="best")
    assert found.origin == "mdistiller README (read), but another got 73.3 (megvii-research/mdistiller#51)"


def test_last_and_best_epochs_are_never_exchanged():
    assert published.find(**CRD, method="kd", epoch="best") is None
    assert published.find(**CRD, method="dkd", epoch="best").top1 == 76.32
    assert published.find(**CRD, method="dkd", epoch="last") is None


@pytest.mark.parametrize(
    "other",
    [
        {"data": "cifar10"},
        {"protocol": "quick"},
        {"protocol": "crd (epochs=30)"},
        {"teacher": "resnet56"},
        {"teacher": "resnet32x4 (epochs=30)"},
        {"teacher": "resnet32x4 (mean=[0.5, 0.5, 0.5], pretrained=True)"},
        {"teacher": "resnet32x4 + resnet32x4"},
        {"student": "resnet8x4 (pretrained=True)"},
        {"method": "kd (temperature=1.0)"},
    ],
)
def test_any_other_setting_has_no_published_number(other):
    assert published.find(**{**CRD, "method": "kd", "epoch": "last", **other}) is None


def test_where_a_teacher_has_its_weights_from_does_not_make_another_pair():
    assert published.find(**{**CRD, "teacher": "resnet32x4 (weights=theirs.pt)"}, method="kd", epoch="last")


def test_a_teacher_is_trained_otherwise_by_settings_that_there_are():
    assert {key.removesuffix("=") for key in published.OTHERWISE_TRAINED} <= set(TeacherSettings.__dataclass_fields__)


def test_a_student_trained_alone_has_the_number_of_any_teachers_row():
    where = {"data": "cifar100", "protocol": "crd", "teacher": "-", "student": "resnet20", "epoch": "last"}
    assert published.find(**where, method="none").top1 == 69.06
    assert published.find(**where, method="kd") is None  # which differs from teacher to teacher


def test_the_recipe_of_a_heterogeneous_pair_depends_on_the_student():
    def find(protocol, student):
        return published.find("cifar100", protocol, "convnext_t" if student == "deit_t" else "swin_t", student,
                              "ofa", "best")  # fmt: skip

    assert find("ofa-vit", "deit_t").top1 == 75.76
    assert find("ofa-cnn", "resnet18").top1 == 80.54
    assert find("ofa-cnn", "deit_t") is find("ofa-vit", "resnet18") is None


def test_unverified_rows_are_kept_but_never_found():
    table = published.everything()
    unverified = table[table.status == "unverified"]
    assert len(unverified) == 54
    for row in unverified.itertuples():
        assert published.find(row.dataset, row.protocol, row.teacher, row.student, row.method, row.epoch) is None


def test_every_other_row_is_found_as_it_stands():
    for row in published.everything().query("status != 'unverified'").itertuples():
        found = published.find(row.dataset, row.protocol, row.teacher, row.student, row.method, row.epoch)
        assert (found.top1, found.source) == (row.top1, row.source)


def test_the_file_names_settings_once_and_by_names_that_are_known():
    table = published.everything()
    assert not table.duplicated(published.KEY).any()
    assert set(table.epoch) == {"last", "best"}
    assert set(table.status) == {"read", "quoted", "unverified"}
    assert (set(table.teacher) | set(table.student)) - names.known() == NETWORKS_OF_OTHERS
    assert {name.partition(" (")[0] for name in table.protocol} - set(protocol_names()) == RECIPES_OF_OTHERS
    assert table.top1.between(0, 100).all()
