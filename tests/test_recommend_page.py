"""The page in a browser, used as a person uses it. Needs gradio, selenium, and a Chromium with its driver."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kept_runs import kept_run, movielens_files
from sequential_recommendation import recommend

pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[page]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium to drive a browser with")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "sequential_recommendation"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium with chromedriver here")

LISTENING = Path("/proc/net/tcp")
LIKED = ["Toy Story (1995)", "Alien (1979)", "Usual Suspects, The (1995)"]
WAIT = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    data = movielens_files(folder / "data")
    return kept_run(folder / "out", data="ml-100k", root=data)


@pytest.fixture(scope="module")
def url(run):
    """The page's, served by a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(FOLDER / "page.py"), f"--run={run}", f"--port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = server.stdout.readline()
        while said and "http://" not in said:
            said = server.stdout.readline()
        assert f"http://127.0.0.1:{port}" in said, "the server ended before it had a page"
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, url):
    browser.get(url)
    until(browser, "#titles input")
    return browser


def until(browser, selector, text=""):
    """The elements of the selector, once there are some, and the first holds the text."""

    def there(driver):
        found = driver.find_elements(By.CSS_SELECTOR, selector)
        return found if found and text in found[0].text else False

    return WebDriverWait(browser, WAIT, ignored_exceptions=[Exception]).until(there)


def pick(browser, title):
    """Types a title and takes the one option that is left."""
    box = browser.find_element(By.CSS_SELECTOR, "#titles input")
    box.send_keys(title)
    WebDriverWait(browser, WAIT).until(lambda d: len(d.find_elements(By.CSS_SELECTOR, "[role=option]")) == 1)
    until(browser, "[role=option]", title)
    box.send_keys(Keys.ENTER)
    WebDriverWait(browser, WAIT).until(lambda d: title in d.find_element(By.ID, "titles").text)
    browser.find_element(By.TAG_NAME, "h1").click()  # closes the list


def ask(browser):
    browser.find_element(By.ID, "ask").click()


def rows(browser, name):
    return [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in until(browser, f"#{name} tbody tr")]


@pytest.fixture
def command(run, capsys):
    """What recommend.py answers to titles."""

    def said(*titles):
        assert recommend.main([f"--run={run}", "--json", "--top=20", *titles]) == 0
        return json.loads(capsys.readouterr().out)

    return said


def test_a_person_gets_the_ranking_of_the_command(opened, command, tmp_path):
    for title in LIKED:
        pick(opened, title)
    ask(opened)
    shown = rows(opened, "ranking")
    expected = command(*LIKED)
    assert expected["gate"]["weights"] != command(*LIKED[::-1])["gate"]["weights"]  # their order matters
    assert f"After {' · '.join(LIKED)}" in until(opened, "#answer", "What comes next")[0].text
    assert [(int(rank), title, int(place)) for rank, title, _, place in shown] == [
        (r["rank"], r["title"], r["sequence_rank"]) for r in expected["recommendations"]
    ]
    shares = [float(share.rstrip("%")) for _, _, share, _ in shown]
    assert shares == [round(100 * r["probability"], 1) for r in expected["recommendations"]]
    assert sum(shares) == pytest.approx(100, abs=1.0)  # twenty numbers, rounded to a tenth
    weights = [float(weight) for _, weight in rows(opened, "gate")]
    assert weights == [round(weight, 3) for weight in expected["gate"]["weights"]]
    bars = opened.find_elements(By.CSS_SELECTOR, "#gate meter")
    assert [float(bar.get_attribute("value")) for bar in bars] == weights
    assert all(bar.size["width"] > 20 for bar in bars)
    picture = tmp_path / "page.png"
    assert opened.save_screenshot(str(picture))
    assert picture.stat().st_size > 10_000


def test_an_example_can_be_taken(opened, command):
    example = until(opened, "#examples button")[0]
    titles = [title.lstrip(", ") for title in re.findall(r".+?\(\d{4}\)", example.text.replace("\n", " "))]
    example.click()
    WebDriverWait(opened, WAIT).until(lambda d: titles[-1] in d.find_element(By.ID, "titles").text)
    ask(opened)
    assert [row[1] for row in rows(opened, "ranking")] == [r["title"] for r in command(*titles)["recommendations"]]


def test_what_is_wrong_is_said_on_the_page(opened):
    ask(opened)
    assert "the history is empty: give one title or more" in until(opened, "[role=alert]")[0].text
    pick(opened, LIKED[0])
    ask(opened)
    assert "1 of the 3 to 10 titles" in until(opened, "#answer", "What comes next")[0].text
    assert not opened.find_elements(By.CSS_SELECTOR, "[role=alert]")


def write(browser, name):
    """Types a name and takes it as it stands there."""
    box = browser.find_element(By.CSS_SELECTOR, "#titles input")
    box.send_keys(name, Keys.ENTER)
    WebDriverWait(browser, WAIT).until(lambda d: name in d.find_element(By.ID, "titles").text)
    browser.find_element(By.TAG_NAME, "h1").click()


def test_accents_and_case_are_forgiven_and_unknown_names_are_said(opened, command):
    for name in ("toy STORY", "amelie & co", "usual suspects"):
        write(opened, name)
    ask(opened)
    expected = command("Toy Story", "Amélie & Co.", "The Usual Suspects")
    assert (
        "After Toy Story (1995) · Amélie & Co. (1997) · Usual Suspects, The (1995)"
        in until(opened, "#answer", "What comes next")[0].text
    )
    assert [row[1] for row in rows(opened, "ranking")] == [r["title"] for r in expected["recommendations"]]
    write(opened, "Toy Sorry")
    write(opened, "Nowhere Land")
    ask(opened)
    alert = until(opened, "[role=alert]")[0].text
    assert alert.startswith("'Toy Sorry' is not known; near it: 'Toy Story (1995)'")
    assert "\n'Nowhere Land' is not known" in alert


def test_nothing_is_fetched_from_elsewhere(opened, url):
    time.sleep(2)  # for what a page loads late
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    addresses = [parameters["request"]["url"] for parameters in sent]
    assert addresses
    own = (url, "data:", "blob:", "chrome:", "chrome-untrusted:", "chrome-extension:")
    assert [address for address in addresses if not address.startswith(own)] == []


@pytest.mark.skipif(not LISTENING.exists(), reason="no /proc/net/tcp to read who listens")
def test_it_listens_on_this_machine_alone(url):
    port = f":{int(url.rsplit(':', 1)[1].strip('/')):04X}"
    lines = [line.split() for line in LISTENING.read_text().splitlines()[1:]]
    assert [line[1] for line in lines if line[3] == "0A" and line[1].endswith(port)] == [f"0100007F{port}"]
    assert "GRADIO_ANALYTICS_ENABLED" not in os.environ  # the script sets it for itself
