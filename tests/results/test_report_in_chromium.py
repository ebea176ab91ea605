"""The report in a real browser: it sorts, filters, shows values by mouse and keyboard, and asks for nothing."""

import json
import shutil

import pytest

from kdzoo.naming import Names
from kdzoo.results.report.page import page

from ..made_runs import candidate, fill, many, search, write

pytest.importorskip("plotly")
webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's own sockets
]
EVIL = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>"
WAIT = 20  # seconds, at most


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    home = tmp_path_factory.mktemp("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
        "--force-device-scale-factor=1",
        f"--user-data-dir={home}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    started.set_script_timeout(WAIT)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A report whose method, pair and classes have names that would be scripts."""
    folder = tmp_path_factory.mktemp("report")
    many(folder / "runs", ["none", "kd", "dkd"], students=("resnet8", "resnet14"), seeds=2, classes=("cat", EVIL, "a"))
    for seed in range(2):
        names = Names(f"mine {EVIL}", "quick", "digits", "vit_s", "resnet8", False)
        evil = write(folder / "runs", 90.0 + seed, seed, "distiller.ce=0.5", names=names)
        fill(evil, ("cat", EVIL, "a"), 90.0, seed=seed)
    spectrum = "".join(f"{name},stage 1,8x8,energy,0-1,0.5\n" for name in ("teacher", "x<b>y</b>"))
    (evil.path / "spectrum.csv").write_text(f"network,stage,grid,measure,band,value\n{spectrum}")
    (folder / "report.html").write_text(page([folder / "runs"]), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def opened(browser, file):
    """The report, just loaded."""
    browser.get(file.as_uri())
    wait_for(browser, "document.documentElement.dataset.ready === 'true'")
    return browser


def wait_for(browser, condition):
    """Return what a condition in JavaScript gives as soon as it holds."""
    return browser.execute_async_script(
        "const done = arguments[0], ask = () => { const found = (() => "
        + f"{condition}"
        + ")(); found ? done(found) : setTimeout(ask, 20); }; ask();"
    )


def rows(browser):
    """The rows of the first table that are shown, as the texts of their cells."""
    return browser.execute_script(
        "return [...document.querySelector('table.results').tBodies[0].rows].filter(row => !row.hidden)"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )


def column(browser, title):
    titles = browser.execute_script(
        "return [...document.querySelectorAll('table.results th')].map(head => head.textContent.trim())"
    )
    return titles.index(title)


def heading(browser, title):
    return browser.find_element(
        "xpath", f"//table[contains(@class, 'results')]//th/button[normalize-space()='{title}']"
    )


def top1(browser):
    at = column(browser, "top-1 last")
    return [float(row[at].split()[0]) for row in rows(browser)]


def test_a_click_on_a_heading_sorts_and_another_turns_the_order(opened):
    assert top1(opened) != sorted(top1(opened), reverse=True)
    heading(opened, "top-1 last").click()
    assert top1(opened) == sorted(top1(opened), reverse=True)
    heading(opened, "top-1 last").click()
    assert top1(opened) == sorted(top1(opened))
    heading(opened, "method").click()
    methods = [row[column(opened, "method")] for row in rows(opened)]
    assert methods == sorted(methods, key=str.lower)


def test_the_keyboard_sorts_too_and_a_reader_is_told_the_order(opened):
    button = heading(opened, "top-1 last")
    opened.execute_script("document.querySelector('table.results th button').focus()")
    for _ in range(20):
        if opened.switch_to.active_element == button:
            break
        opened.switch_to.active_element.send_keys("\ue004")  # the tabulator
    assert opened.switch_to.active_element == button
    button.send_keys("\ue007")  # enter
    assert top1(opened) == sorted(top1(opened), reverse=True)
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"


def test_filters_leave_the_rows_that_fit(opened):
    everything = rows(opened)
    opened.find_element("id", "method").send_keys("DK")
    assert {row[column(opened, "method")] for row in rows(opened)} == {"dkd"}
    assert opened.find_element("id", "count").text == f"2 of {len(everything)} rows"
    opened.execute_script("document.getElementById('method').select()")
    opened.find_element("id", "method").send_keys("\ue003")  # backspace
    assert rows(opened) == everything
    opened.find_element("xpath", "//select[@id='pair']/option[contains(., 'resnet14')]").click()
    assert {row[column(opened, "student")] for row in rows(opened)} == {"resnet14"}
    assert len(rows(opened)) == 3


def test_every_input_has_a_name_that_is_read_aloud(opened):
    unnamed = opened.execute_script(
        "return [...document.querySelectorAll('input, select, button')].filter(element =>"
        " !element.textContent.trim() && !element.labels?.length).map(element => element.outerHTML)"
    )
    assert unnamed == []
    opened.execute_script("document.body.append(document.createElement('input'))")
    assert opened.execute_script("return [...document.querySelectorAll('input')].some(input => !input.labels.length)")


def figure(browser, name):
    """The plot of a figure, scrolled to and drawn."""
    plot = browser.find_element("css selector", f"figure[data-figure='{name}-0'] .plot")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    wait_for(browser, f"document.querySelector(\"figure[data-figure='{name}-0'] .main-svg\")")
    return plot


def hover(browser):
    return wait_for(browser, "document.querySelector('.hoverlayer .hovertext')?.textContent")


@pytest.mark.parametrize(("name", "said"), [("curves", "epoch 3: 6"), ("forest", "interval")])
def test_pointing_at_a_figure_shows_the_value(opened, name, said):
    plot = figure(opened, name)
    assert not plot.find_elements("css selector", ".hoverlayer .hovertext")
    x, y = opened.execute_script(
        "const plot = arguments[0], axes = plot._fullLayout, trace = plot.data[0], last = trace.x.length - 1;"
        "const box = plot.getBoundingClientRect(), size = axes._size;"
        "return [size.l + axes.xaxis.d2p(trace.x[last]) - box.width / 2,"
        " size.t + axes.yaxis.d2p(trace.y[last]) - box.height / 2]",
        plot,
    )
    webdriver.ActionChains(opened).move_to_element_with_offset(plot, round(x), round(y)).perform()
    assert said in hover(opened)


def test_the_arrow_keys_show_the_values_one_by_one(opened):
    plot = figure(opened, "curves")
    plot.send_keys("\ue014")  # right
    assert "epoch 1: " in hover(opened)
    plot.send_keys("\ue014")
    wait_for(opened, "document.querySelector('.hoverlayer .hovertext')?.textContent.includes('epoch 2: ')")


def test_a_choice_above_a_figure_changes_what_it_shows(opened):
    plot = figure(opened, "curves")
    before = plot.find_element("css selector", ".ytitle").text
    opened.find_element("xpath", "//figure[@data-figure='curves-0']//option[contains(., 'loss: ce')]").click()
    after = wait_for(
        opened, "[...document.querySelectorAll('.ytitle')].map(e => e.textContent).find(t => t === 'loss: ce')"
    )
    assert after != before


def test_another_run_may_be_looked_into(opened):
    pane = opened.find_element("id", "one-run")
    first = pane.text
    assert "Surest mistakes" in first
    assert "kdzoo run --distiller" in first
    opened.find_element("xpath", "//select[@id='run']/option[2]").click()
    assert pane.text != first


def test_a_search_at_work_is_shown_though_no_run_is_finished(browser, tmp_path):
    complaints(browser)  # of pages before
    search(tmp_path, [(candidate("kd"), (), 0.02)], [(candidate(f"mine {EVIL}"), ""), (candidate("at"), "")])
    (tmp_path / "report.html").write_text(page([tmp_path]), encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())
    wait_for(browser, "document.documentElement.dataset.ready === 'true'")
    plot = figure(browser, "search")
    assert not browser.find_element("id", "one-run").is_displayed()
    plot.send_keys("\ue014")  # right
    assert "stopped after epoch 1, place 2 of 3" in hover(browser)
    assert "onerror" in hover(browser)
    assert browser.execute_script("return window.harmed") is None
    assert complaints(browser) == []


def background(browser):
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_the_page_is_light_or_dark_as_the_reader_chooses(opened):
    for choice in ("dark", "light"):
        opened.find_element("xpath", f"//select[@id='theme']/option[.='{choice}']").click()
        assert (background(opened) == "rgb(255, 255, 255)") == (choice == "light")


def test_a_narrow_screen_scrolls_the_table_and_never_the_page(opened):
    opened.set_window_size(500, 900)
    try:
        figure(opened, "curves")
        wait_for(opened, "document.documentElement.scrollWidth <= innerWidth")  # figures follow the window soon
        assert opened.execute_script(
            "const t = document.querySelector('.scroll'); return t.scrollWidth > t.clientWidth"
        )
    finally:
        opened.set_window_size(1400, 1000)


def asked(browser):
    """The addresses that were asked for, without the page's own and what lies in it."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    found = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in found if not url.startswith(("data:", "blob:", browser.current_url))]


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_no_name_is_a_script_nothing_is_asked_for_and_nothing_fails(browser, file):
    asked(browser), complaints(browser)
    browser.get(file.as_uri())
    wait_for(browser, "document.documentElement.dataset.ready === 'true'")
    for name in ("forest", "cost", "curves"):
        figure(browser, name)
    for index in range(len(browser.find_elements("css selector", "#run option"))):
        browser.find_element("xpath", f"//select[@id='run']/option[{index + 1}]").click()
    assert "onerror" in browser.find_element("id", "one-run").text
    assert browser.execute_script("return window.harmed") is None
    assert asked(browser) == []
    assert complaints(browser) == []
    assert "x<b>y</b>" in browser.execute_script("return document.body.textContent")
    # The controls: an error is seen, a request is seen, and the page's policy stops a script that is added to it.
    browser.execute_script("console.error('seen')")
    assert any("seen" in line for line in complaints(browser))
    browser.execute_script(
        "const s = document.createElement('script'); s.text = 'window.harmed = 1'; document.body.append(s)"
    )
    assert browser.execute_script("return window.harmed") is None
    assert any("Content Security Policy" in line for line in complaints(browser))
    other = file.with_name("other.html")
    other.write_text("<img src='http://127.0.0.1:9/x'><script>window.harmed = 1</script>")
    browser.get(other.as_uri())
    assert browser.execute_script("return window.harmed") == 1
    assert any(url.startswith("http://127.0.0.1:9/") for url in asked(browser))
