"""The search page in a real browser. Debian has it: apt-get install chromium chromium-driver."""

import dataclasses
import shutil

import pytest
import serving
from indexes import streamed
from serving import DOCUMENTS, HOSTILE

from sgpt_jax.index.build import build_index
from sgpt_jax.serve.http import Limits

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

SWITCHES = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
    "--disable-component-update --disable-dev-shm-usage --window-size=1000,1000"
)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with serving.serve(serving.tiny_models(tmp_path_factory.mktemp("page"))) as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for switch in SWITCHES.split():
        options.add_argument(switch)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as found:
        yield found


@pytest.fixture
def page(live, chromium):
    chromium.get("about:blank")
    chromium.get_log("browser")
    chromium.get(live[0])
    serving.until(lambda: one(chromium, "#about").text == "tiny, 3 documents")
    return chromium


def one(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector)


def every(page, selector):
    return page.find_elements(By.CSS_SELECTOR, selector)


def search(page, query):
    one(page, "#query").clear()
    one(page, "#query").send_keys(query, Keys.ENTER)
    serving.until(lambda: every(page, "#hits li") and page.title == f"{query} – Search")


def log_probs(item):
    return [float(part.text.replace("−", "-")) for part in every(item, ".tokens small")]


def test_search_shows_documents_and_hostile_ones_as_text(page):
    search(page, "the heron waits")
    assert len(every(page, "#hits li")) == 3
    titles = [title.text for title in every(page, "h2")]
    assert any(title.startswith(HOSTILE) for title in titles)
    assert page.title == "the heron waits – Search"
    assert not every(page, "#hits img, #hits script")
    assert one(page, "#status").text.startswith("3 of 3 documents in ")
    assert all(item.text.count("similarity") == 1 for item in every(page, "#hits li"))
    # Errors and warnings; chromium also gives advice.
    assert [line for line in page.get_log("browser") if line["level"] != "DEBUG"] == []


def test_the_query_is_shown_as_text(page):
    search(page, HOSTILE)
    assert page.title == f"{HOSTILE} – Search"
    one(page, "button.quiet").click()
    serving.until(lambda: every(page, ".tokens"))
    assert not every(page, "main img, main script")


def test_reranking_orders_and_colours(page, live):
    search(page, "the heron waits")
    one(page, "#switch").click()
    serving.until(lambda: len(every(page, ".tokens")) == 3)
    model = live[1].models.cross_encoder
    texts = {document.id: document.text for document in DOCUMENTS}
    scores = []
    for item in every(page, "#hits li"):
        pieces, values = model.token_log_probs("the heron waits", texts[one(item, ".id").text])
        assert log_probs(item) == pytest.approx(values.tolist(), abs=0.051)
        shown = [part.text.splitlines()[0] for part in every(item, ".tokens span")]
        assert shown == [piece.strip() or "␣" for piece in pieces]
        scores.append(values.sum())
        # A colour for each level, and the more probable, the higher the level.
        levels = [int(part.get_attribute("class")[1:]) for part in every(item, ".tokens span")]
        assert [levels[i] for i in values.argsort()] == sorted(levels)
    assert scores == sorted(scores, reverse=True)
    assert one(page, "#legend").is_displayed()
    # The search is in the address, behind #, which no server sees; opened again it is there.
    assert "#q=the+heron+waits&rerank=1" in page.current_url
    page.refresh()
    serving.until(lambda: len(every(page, ".tokens")) == 3)
    one(page, "#switch").click()
    serving.until(lambda: not every(page, ".tokens"))


def test_why_without_reranking(page):
    search(page, "heron")
    one(page, "button.quiet").click()
    serving.until(lambda: every(page, ".tokens"))
    assert len(every(page, ".tokens")) == 1
    assert len(every(page, "button.quiet")) == 2


def test_keys_alone(page):
    search(page, "heron")
    one(page, "#query").send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("id") == "rerank"
    for key, number in (("j", 0), ("j", 1), ("k", 0), ("k", 0)):
        page.switch_to.active_element.send_keys(key)
        assert page.switch_to.active_element == every(page, "#hits li")[number]
    page.switch_to.active_element.send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "query"


@pytest.mark.parametrize(("width", "mobile"), [(360, True), (1000, False)])
def test_nothing_is_wider_than_the_screen(page, width, mobile):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": mobile}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        search(page, "heron " * 6 + "h" * 60)
        one(page, "#switch").click()
        serving.until(lambda: every(page, ".tokens"))
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        one(page, "#switch").click()
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_is_readable(page, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        pairs = page.execute_script("""
            const found = [];
            const pair = (element) => {
              const style = getComputedStyle(element);
              found.push([style.color, style.backgroundColor]);
            };
            for (let level = 0; level < 7; level++) {
              const part = document.createElement("span");
              part.className = `l${level}`;
              document.body.append(part);
              pair(part);
              part.remove();
            }
            pair(document.body);
            pair(document.querySelector("button"));
            found.push([getComputedStyle(document.querySelector("#status")).color, found[7][1]]);
            return found;
        """)
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    for pair in pairs:
        light, dark = sorted((luminance(colour) for colour in pair), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair


def luminance(colour):
    """Of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_no_other_host_is_asked(page, live):
    page.get_log("performance")
    page.refresh()
    search(page, "ferry")
    asked = [
        line["message"]
        for line in page.get_log("performance")
        if 'Network.requestWillBeSent"' in line["message"]
    ]
    assert asked
    assert all(f'"url":"{live[0]}/' in message or '"url":"data:' in message for message in asked)


def test_without_texts_there_is_nothing_to_explain(chromium, tmp_path):
    models = serving.tiny_models(tmp_path)
    encode = streamed(models.encoder.encode_document)
    index = build_index(tmp_path / "bare", DOCUMENTS, encode, store_texts=False)
    with serving.serve(dataclasses.replace(models, index=index)) as (address, _):
        chromium.get(address)
        serving.until(lambda: one(chromium, "#about").text == "tiny, 3 documents")
        search(chromium, "heron")
        assert not every(chromium, "#hits button")


def test_key(live, chromium):
    with serving.listening_with(live[1], Limits(api_key="secret")) as address:
        chromium.get(address)
        serving.until(lambda: one(chromium, "#key").is_displayed())
        one(chromium, "#key").send_keys("wrong", Keys.ENTER)
        serving.until(lambda: "wrong" in one(chromium, "#status").text)
        one(chromium, "#key").send_keys("secret", Keys.ENTER)
        serving.until(lambda: not one(chromium, "#key").is_displayed())
        search(chromium, "heron")
        assert len(every(chromium, "#hits li")) == 3
        assert "secret" not in chromium.current_url


def test_it_waits_for_the_model(chromium):
    with serving.serve(None) as (address, _):
        chromium.get(address)
        serving.until(lambda: "being loaded" in one(chromium, "#status").text)
        chromium.get("about:blank")
