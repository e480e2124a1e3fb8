import sys

import pytest

from secateur.errors import UsageError
from secateur.methods import list_methods, registry
from secateur.methods.plugins import load_plugin

METHOD = """
import secateur
from secateur.methods import Descriptor, WeightMethod


@secateur.register("{name}")
class Outsider(WeightMethod):
    descriptor = Descriptor(
        object="weights", granularity="element", score="random", allocation="uniform", data="none", speedup="none"
    )
"""


pytestmark = pytest.mark.usefixtures("forget_plugins")


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_file_registers_its_method_once(tmp_path):
    source = write(tmp_path / "outsider.py", METHOD.format(name="outsider_a"))
    load_plugin(source)
    load_plugin(source)
    assert "outsider_a" in list_methods()


def test_a_module_on_the_path(tmp_path, monkeypatch):
    write(tmp_path / "outsider_module.py", METHOD.format(name="outsider_b"))
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugin("outsider_module")
    assert "outsider_b" in list_methods()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", "registers no method"),
        ("x = = 1\n", "line 1: invalid syntax"),
        ("\nraise ValueError('a\\nb')\n", r"ValueError: a b \(.*broken.py, line 2\)"),
        (METHOD.format(name="flap"), "'flap' is registered already"),
    ],
)
def test_a_broken_file_is_named_in_one_sentence(tmp_path, text, said):
    source = write(tmp_path / "broken.py", text)
    with pytest.raises(UsageError, match=said) as caught:
        load_plugin(source)
    assert source in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"), [("./nowhere.py", "not a file"), ("nowhere_at_all", r"\./nowhere_at_all.py")]
)
def test_a_missing_plugin_is_named(source, said):
    with pytest.raises(UsageError, match=said):
        load_plugin(source)


def test_a_folder_is_not_a_plugin(tmp_path):
    with pytest.raises(UsageError, match=r"end in \.py"):
        load_plugin(write(tmp_path / "text.txt", "x"))


def install(site, name, module, text):
    """A distribution as an installer leaves it: the module and its entry point."""
    write(site / f"{module}.py", text)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    write(info / "METADATA", f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    write(info / "entry_points.txt", f"[secateur.methods]\n{name} = {module}\n")


def test_an_installed_method_is_listed_and_imported_when_asked_for(tmp_path, monkeypatch, cli):
    install(tmp_path, "outsider_c", "outsider_package", METHOD.format(name="outsider_c"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "outsider_c" in list_methods()
    assert "outsider_package" not in sys.modules
    assert registry.get_method("outsider_c").name == "outsider_c"
    assert "outsider_c" in cli("methods").out


def test_a_broken_installed_method_is_named(tmp_path, monkeypatch, cli):
    install(tmp_path, "outsider_d", "outsider_broken", "import no_such_module_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = cli("describe", "outsider_d")
    assert run.code == 2 and "outsider_broken" in run.err and "no_such_module_here" in run.err


def test_an_entry_point_must_keep_its_promise(tmp_path, monkeypatch, cli):
    install(tmp_path, "outsider_e", "outsider_empty", "x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = cli("describe", "outsider_e")
    assert run.code == 2 and "outsider_empty registers no method named 'outsider_e'" in run.err
