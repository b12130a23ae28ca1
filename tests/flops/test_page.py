"""The page in a real browser, opened from disk: headless Chromium through its own driver."""

import shutil

import pytest
import torch

import fxsparse
import fxsparse.models as models
from fxsparse.flops import plan_flops
from fxsparse.flops.page import page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its chromedriver on the PATH")

FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1400,900")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=["resnet50", "vit_l_16"])
def opened(request, browser, tmp_path_factory):
    with torch.device("meta"):
        model, x = models.build(request.param), torch.empty(1, 3, 224, 224)
    report = plan_flops(model, x, sparsity=0.9)
    path = tmp_path_factory.mktemp("page") / "report.html"
    groups = fxsparse.channel_groups(model, x) if request.param == "resnet50" else "no groups of channels: <because>"
    path.write_text(page(report, f"{request.param} </script> & co", groups), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    browser.get(path.as_uri())
    yield browser, report, groups
    assert browser.get_log("browser") == []  # no error, no warning, nothing that it could not load


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


def column(browser, index):
    script = "return [...document.querySelectorAll('#table tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    return browser.execute_script(script, index)


def tab(browser, name):
    next(button for button in all_of(browser, "nav button") if button.text == name).click()


def test_totals_and_title(opened):
    browser, report, _ = opened
    assert browser.title.endswith("</script> & co \u2013 FLOPs")
    figures = [figure.text for figure in all_of(browser, ".figure b")]
    assert figures[:2] == [f"{report.dense_macs:,}", f"{report.macs:,}"]
    assert figures[4] == f"{report.ratio:.4f}"


def test_sorting(opened):
    browser, report, _ = opened
    heads = {head.text: head for head in all_of(browser, "#table th")}
    in_order = column(browser, 0)
    position = list(heads).index("MACs sparse")
    heads["MACs sparse"].click()
    found = [int(text.replace(",", "")) for text in column(browser, position)]
    assert found == sorted((node.sparse_macs for node in report.nodes if node.macs), reverse=True)
    assert heads["MACs sparse"].get_attribute("aria-sort") == "descending"
    heads["MACs sparse"].click()
    assert [int(text.replace(",", "")) for text in column(browser, position)] == found[::-1]
    heads["layer"].click()
    names = column(browser, 0)
    assert sorted(names) == sorted(in_order) and heads["layer"].get_attribute("aria-sort") == "ascending"
    assert heads["MACs sparse"].get_attribute("aria-sort") is None


def test_filtering(opened):
    browser, report, _ = opened
    field = all_of(browser, "#filter")[0]
    everything = len(column(browser, 0))
    field.send_keys("layer1 conv2d" if any("layer1" in n.module for n in report.nodes) else "layer_1. linear")
    left = column(browser, 0)
    assert 0 < len(left) < everything
    assert all("layer1" in name or "layer_1." in name for name in left)
    assert all_of(browser, "#count")[0].text == f"{len(left)} of {everything} layers"
    field.clear()
    field.send_keys("no such layer")
    assert column(browser, 0) == []
    browser.execute_script("arguments[0].value = ''; arguments[0].dispatchEvent(new Event('input'))", field)
    assert len(column(browser, 0)) == everything


def test_folding(opened):
    browser, report, _ = opened
    tab(browser, "Modules")
    visible = lambda: [line for line in all_of(browser, "#tree .leaf, #tree summary") if line.is_displayed()]  # noqa: E731
    at_first = len(visible())
    all_of(browser, "#unfold")[0].click()
    unfolded = len(visible())
    all_of(browser, "#fold")[0].click()
    assert len(visible()) == 2 < at_first < unfolded  # the head and the model
    all_of(browser, "#tree summary")[0].click()
    assert len(visible()) == at_first
    total = all_of(browser, "#tree summary .r")
    assert total[0].text == f"{report.dense_macs:,}" and total[1].text == f"{report.macs:,}"


def test_graph_pans_and_zooms(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    browser, report, _ = opened
    tab(browser, "Graph")
    assert len(all_of(browser, "#nodes .node")) == len(report.links)
    assert len(all_of(browser, "#edges path")) == sum(len(sources) for _, sources in report.links)
    picture = all_of(browser, "#picture")[0]
    view = lambda: [float(x) for x in picture.get_dom_attribute("viewBox").split()]  # noqa: E731
    width = view()[2]
    all_of(browser, "#in")[0].click()
    assert view()[2] == pytest.approx(0.7 * width, abs=0.1)
    before = view()
    ActionChains(browser).move_to_element(picture).click_and_hold().move_by_offset(60, 40).release().perform()
    assert view()[0] < before[0] and view()[1] < before[1] and view()[2:] == before[2:]
    all_of(browser, "#reset")[0].click()
    lowest = max(float(rect.get_dom_attribute("y")) for rect in all_of(browser, "#nodes rect"))
    assert view()[1] + view()[3] > lowest + 24
    assert_apart(browser, "#nodes rect")


def assert_apart(browser, selector):
    boxes = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(r => [+r.getAttribute('x'), +r.getAttribute('y'), "
        "+r.getAttribute('width'), +r.getAttribute('height')])",
        selector,
    )
    apart = lambda a, b: a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]  # noqa: E731
    assert boxes and all(apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_groups_of_channels(opened):
    browser, _, groups = opened
    tab(browser, "Channels")
    if isinstance(groups, str):
        assert all_of(browser, "#channels-summary")[0].text == groups
        assert not all_of(browser, "#channels-found")[0].is_displayed()
        return
    assert all_of(browser, "#channels-summary")[0].text == "ResNet: 37 groups of channels, 1 more that stay whole"
    lines = "[...document.querySelectorAll('#channels-table tbody tr')]"
    cells = browser.execute_script(f"return {lines}.map(r => [...r.cells].map(c => c.textContent))")
    assert cells == [[str(value) for value in row] for row in groups.rows()]
    stream = next(row for row in cells if row[0].startswith("layer1.0.conv3.weight"))
    assert stream[1:3] == ["256", "256"]  # the first residual stream: 256 channels, all of them exact
    boxes = all_of(browser, "#channels-nodes .node")
    assert [box.get_attribute("data-name") for box in boxes] == [group.name for group in groups.groups]
    assert all_of(browser, "#channels-edges path") and browser.get_log("browser") == []
    assert_apart(browser, "#channels-nodes rect")
    picture = all_of(browser, "#channels-picture")[0]
    width = float(picture.get_dom_attribute("viewBox").split()[2])
    all_of(browser, "#channels-in")[0].click()
    assert float(picture.get_dom_attribute("viewBox").split()[2]) == pytest.approx(0.7 * width, abs=0.1)


def test_without_groups_there_is_no_tab(browser, tmp_path):
    report = plan_flops(torch.nn.Linear(4, 3), torch.randn(2, 4))
    (tmp_path / "report.html").write_text(page(report), encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())
    assert [button.text for button in all_of(browser, "nav button") if button.is_displayed()] == [
        "Layers",
        "Modules",
        "Graph",
    ]
    assert browser.get_log("browser") == []
