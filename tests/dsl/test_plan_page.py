"""The page of a plan: its numbers are the plan's, it needs nothing else, and it works in a browser."""

import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import preble_sgl as ps
from preble_sgl.core import ProgramId, Request, SamplingParams, new_request_id, token_ids
from preble_sgl.dsl.bounds import Bounds
from preble_sgl.dsl.call_graph import CallGraph, CallNode, call_graph
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.conversation import Segment
from preble_sgl.dsl.explore import Trace
from preble_sgl.dsl.icicle import MOST_PLACES, Icicle, icicle
from preble_sgl.dsl.plan import Plan
from preble_sgl.dsl.plan_page import BOX, count, drawn, figures, page
from preble_sgl.dsl.tracer import Reading, TracedCall

if TYPE_CHECKING:
    from playwright.async_api import Locator, Page

BROWSER = shutil.which("chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
RUBRIC = "You review source code for a team that has to live with it for years. " * 12
SHOTS = [("x = eval(text)", "It runs whatever the text says."), ("except: pass", "The error is lost.")]


@ps.program
async def review(s: ps.State, source: str, topics: list[str]) -> str:
    s += ps.system(RUBRIC)
    s += ps.few_shot(SHOTS, lambda shot: ps.user(shot[0]) + ps.assistant(shot[1]))
    s += ps.user(source)
    notes = await s.map(topics, lambda b, topic: b.ask(ps.user(f"On {topic}."), max_tokens=40))
    s += ps.user("\n".join(notes))
    for _ in s.loop(max=3):
        if "NONE" in await s.ask(ps.user("What is least certain? Or say NONE."), max_tokens=30):
            break
    s += ps.user("Decide.")
    return await s.gen(max_tokens=20)


@pytest.fixture
async def plan(chat: ChatFormat) -> Plan:
    """A plan with a fan-out, a loop and few-shot messages: three rows."""
    sources = [f"def f{i}(x):\n    return x + {i}\n" * 20 for i in range(3)]
    rows = [{"source": source, "topics": ["names", "tests"]} for source in sources]
    return await review.aplan(rows, fleet=chat)


def main_of(html: str) -> ET.Element:
    """Parse what the page shows: it is XML, its pictures included."""
    found = re.search(r"<main>.*</main>", html, re.DOTALL)
    assert found is not None
    return ET.fromstring(found.group())


def texts(element: ET.Element, path: str) -> list[str]:
    return ["".join(each.itertext()) for each in element.findall(path)]


def places(main: ET.Element) -> list[ET.Element]:
    return [each for each in main.iter("svg") if (each.get("class") or "").startswith("place")]


def made_up(calls: list[TracedCall], rows: int = 1, **fields: Any) -> Plan:
    reading = Reading(tuple(calls), (), ())
    return Plan("made_up", tuple(Trace(row, (reading,)) for row in range(rows)), **fields)


def made(prompt: list[int], *labels: str) -> TracedCall:
    """Return a call whose prompt has one token per label, and the rest from the last one."""
    request = Request(
        request_id=new_request_id(),
        program_id=ProgramId("p"),
        call_path="p/call0",
        prompt=token_ids(prompt),
        sampling=SamplingParams(max_new_tokens=0),
    )
    ends = [*range(1, len(labels)), len(prompt)]
    segments = tuple(Segment(label, end) for label, end in zip(labels, ends, strict=True))
    return TracedCall(request, segments, token_ids(), line="p.py:9")


async def test_the_numbers_at_the_top_are_those_of_the_plan(plan: Plan) -> None:
    bounds = plan.bounds
    rows, calls, prompt, reusable, rate = figures(plan)
    assert (rows.number, rows.notes) == ("3", ())
    assert calls.label == "calls expected"
    assert calls.number == count(bounds.calls.expected)
    assert calls.notes == (f"at least {bounds.calls.lower}", f"at most {bounds.calls.upper}")
    assert (bounds.calls.lower, bounds.calls.upper) == (12, 18)
    assert prompt.number == f"{bounds.prompt_tokens.expected:,.0f}"
    assert reusable.number == f"{bounds.reusable_tokens.expected:,.0f}"
    assert rate.number == f"{bounds.reusable_tokens.expected / bounds.prompt_tokens.expected:.0%}"
    assert texts(main_of(page(plan)), "./dl/div/dd[1]") == [each.number for each in figures(plan)]


def test_numbers_that_are_certain_have_no_bounds_beside_them() -> None:
    both = [made([1, 2, last], "user p.py:1") for last in (3, 4)]
    rows, calls, prompt, reusable, rate = figures(made_up(both))
    assert [(each.label, each.number, each.notes) for each in (rows, calls, prompt, reusable)] == [
        ("rows", "1", ()),
        ("calls", "2", ()),
        ("prompt tokens", "6", ()),
        ("reusable tokens", "2", ()),
    ]
    assert (rate.number, rate.notes) == ("33%", ("4 to compute",))


async def test_a_plan_without_an_upper_bound_says_so_and_names_the_line(chat: ChatFormat) -> None:
    @ps.program
    async def forever(s: ps.State) -> None:
        while "done" not in await s.ask(ps.user("Go on."), max_tokens=3):
            pass

    forever_plan = await forever.aplan([{}], fleet=chat)
    (finding,) = texts(main_of(page(forever_plan)), "./ul[@class='findings']/li")
    assert finding.startswith("not read")
    assert "use s.loop(max=...)" in finding
    assert "no upper bound" in page(forever_plan)


async def test_every_place_has_a_rectangle_and_a_row_with_its_numbers(plan: Plan) -> None:
    main = main_of(page(plan))
    tree = icicle(plan.tree())
    rows = [texts(row, "./td") for row in main.findall(".//tbody/tr")]
    assert len(places(main)) == len(rows) == len(tree.places)
    for place, row, drawn_place in zip(tree.places, rows, places(main), strict=True):
        numbers = [place.width, place.texts, place.tokens, place.reused_tokens]
        assert row[:2] == [place.label, place.kind]
        assert [row[2], row[3], row[5], row[6]] == [count(number) for number in numbers]
        assert row[4] == str(place.nodes[0].num_calls)
        assert row[7] == f"{100 * place.reused_rate:.0f} %"
        assert texts(drawn_place, "./title")[0].splitlines()[0] == place.label
    assert "4 messages" in rows[1][0]
    assert sum(place.tokens for place in tree.places) == pytest.approx(plan.bounds.prompt_tokens.expected)


async def test_the_solid_part_of_a_rectangle_is_the_reused_share(plan: Plan) -> None:
    for place, shown in zip(icicle(plan.tree()).places, places(main_of(page(plan))), strict=True):
        solid, hatched, _ = shown.findall("./rect")
        assert (solid.get("class"), hatched.get("class")) == ("reused", "computed")
        assert solid.get("height") == hatched.get("y") == f"{100 * place.reused_rate:.4f}%"


def test_what_a_program_says_is_escaped() -> None:
    bad = '<script>alert("1")</script>&'
    call = made([1, 2, 3], f"user {bad}", f"user {bad}2")
    html = page(made_up([call], warnings=(bad,)))
    assert bad not in html
    main = main_of(html)
    assert texts(main, ".//tbody/tr/td/button") == [f"user {bad}", f"user {bad}2"]
    assert texts(main, "./ul[@class='findings']/li/span") == [bad]


async def test_the_page_needs_nothing_from_elsewhere(plan: Plan) -> None:
    html = page(plan)
    assert "http" not in html
    assert re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")>]*)', html) == [
        "data:,",
        *(f"#hatch-{kind}" for kind in ("constant", "argument", "generated", "plain")),
        *["#tip"] * len(call_graph(plan).edges),
    ]
    assert "@import" not in html


async def test_html_writes_the_page_and_returns_its_path(plan: Plan, tmp_path: Path) -> None:
    path = plan.html(tmp_path / "plan.html")
    assert path == tmp_path / "plan.html"
    assert path.read_text(encoding="utf-8") == page(plan)


def test_a_plan_without_calls_has_a_page() -> None:
    html = page(made_up([]))
    assert "No calls were read" in html
    assert places(main_of(html)) == []


def test_the_page_does_not_grow_with_the_rows() -> None:
    one_row = [made([1, 2, 3, i], "system p.py:1", "user p.py:2") for i in range(5)]
    few, many = page(made_up(one_row, rows=10)), page(made_up(one_row, rows=10_000))
    assert "50,000 calls" in many
    assert len(many) < len(few) + 1000


def test_a_large_tree_is_cut_and_says_how_much_is_missing() -> None:
    calls = [made([i, 2], f"user a_program_with_a_long_name.py:{i}", "gen p.py:2") for i in range(400)]
    html = page(made_up(calls))
    assert len(places(main_of(html))) == MOST_PLACES
    assert f"{800 - MOST_PLACES} places with the fewest tokens are left out" in html
    assert len(html) < 300_000


async def test_the_drawn_call_graph_has_the_nodes_and_edges_of_the_plan_and_no_others(plan: Plan) -> None:
    graph = call_graph(plan)
    picture = drawn(graph)
    assert [box.node for box in picture.boxes] == list(graph.nodes.values())
    assert sorted(arrow.calls for arrow in picture.arrows) == sorted(graph.edges.values())
    svg = next(each for each in main_of(page(plan)).iter("svg") if each.get("id") == "graph")
    assert texts(svg, "./g/text[1]") == list(graph.nodes)
    assert len(svg.findall("./path")) == len(graph.edges)
    ask = next(line for line in graph.nodes if (line, line) in graph.edges)
    (loop,) = (arrow for arrow in picture.arrows if arrow.goes_back)
    assert loop.calls == graph.edges[ask, ask]


def graph_of(lines: str, *edges: str) -> CallGraph:
    nodes = {line: CallNode(line, Bounds(1, 1, 1), 10) for line in lines}
    return CallGraph(nodes, {(edge[0], edge[1]): float(i + 1) for i, edge in enumerate(edges)})


def test_a_line_that_a_later_line_can_skip_to_is_no_loop() -> None:
    """c is met before b when the first reading skips b."""
    picture = drawn(graph_of("acb", "ac", "ab", "bc"))
    assert not any(arrow.goes_back for arrow in picture.arrows)
    a, c, b = (box.x for box in picture.boxes)
    assert a < b < c


def test_an_edge_that_skips_a_layer_passes_beside_the_node_there() -> None:
    picture = drawn(graph_of("abc", "ab", "bc", "ac"))
    skipping = next(arrow for arrow in picture.arrows if arrow.calls == 3)
    passes_at = float(re.findall(r"[\d.]+(?=H)", skipping.path)[0])
    b = picture.boxes[1]
    assert not b.y <= passes_at <= b.y + BOX[1]


def test_edges_of_loops_go_back_below_the_nodes_that_they_pass() -> None:
    picture = drawn(graph_of("abcd", "ab", "bc", "cd", "cb", "dd"))
    back = {arrow.calls: arrow for arrow in picture.arrows if arrow.goes_back}
    assert set(back) == {4, 5}
    assert all(arrow.y > box.y + BOX[1] for arrow in back.values() for box in picture.boxes)
    assert all(arrow.y < picture.height for arrow in back.values())


def test_nodes_of_the_drawn_call_graph_stand_apart_and_within_it() -> None:
    picture = drawn(graph_of("abcdefg", "ab", "ac", "ad", "be", "ce", "de", "ef", "ag", "fb"))
    for one, other in combinations(picture.boxes, 2):
        assert abs(one.x - other.x) >= BOX[0] or abs(one.y - other.y) >= BOX[1]
    for box in picture.boxes:
        assert 0 <= box.x <= picture.width - BOX[0]
        assert 0 <= box.y <= picture.height - BOX[1]


@pytest.fixture
async def shown(plan: Plan, tmp_path: Path) -> "AsyncIterator[Page]":
    """The page in a browser; fails at the end if the browser had anything to say."""
    if BROWSER is None:
        pytest.skip("no chromium: apt-get install chromium")
    from playwright.async_api import async_playwright

    said: list[str] = []
    loaded: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        tab = await browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: loaded.append(request.url))
        address = plan.html(tmp_path / "plan.html").as_uri()
        await tab.goto(address)
        yield tab
        await browser.close()
    assert said == []
    assert {url for url in loaded if not url.startswith("data:")} == {address}


async def visible(locator: "Locator") -> int:
    return sum([await each.is_visible() for each in await locator.all()])


async def corners(rectangle: "Locator") -> list[float]:
    """Return x, y, width and height in percent of what is shown."""
    names = "['x', 'y', 'width', 'height']"
    script = f"each => {names}.map((name) => parseFloat(each.getAttribute(name)))"
    found: list[float] = await rectangle.evaluate(script)
    return found


def num_under(tree: Icicle, top: int) -> int:
    """Count a place and all below it."""
    found = {top}
    for number, place in enumerate(tree.places):
        if place.parent in found:
            found.add(number)
    return len(found)


async def test_in_a_browser_a_place_zooms_in_and_the_whole_tree_comes_back(plan: Plan, shown: "Page") -> None:
    tree = icicle(plan.tree())
    rectangles = shown.locator("#tree .place")
    assert await rectangles.count() == await shown.locator("#places tbody tr").count() == len(tree.places)
    assert await visible(rectangles) == len(tree.places)
    labels = [f"{place.role} {place.kind}" for place in tree.places]
    number = labels.index("user generated")
    small = await corners(rectangles.nth(number))
    for way_out in ("#root", "#path button >> nth=0", "Escape"):
        await rectangles.nth(number).click()
        large = await corners(rectangles.nth(number))
        assert large[:2] == [0, 0]
        assert large[2] > 1.5 * small[2]
        assert large[3] == 100 > small[3]
        assert await visible(rectangles) == num_under(tree, number)
        path = await shown.locator("#path > *").all_text_contents()
        assert [path[0], path[-1]] == ["whole tree", tree.places[number].label]
        if way_out == "Escape":
            await shown.keyboard.press(way_out)
        else:
            await shown.locator(way_out).click()
        assert await corners(rectangles.nth(number)) == small
        assert await visible(rectangles) == len(tree.places)


async def test_in_a_browser_places_can_be_reached_by_keyboard_and_by_the_table(shown: "Page") -> None:
    rectangles = shown.locator("#tree .place")
    await shown.locator("#root").focus()
    await shown.keyboard.press("Tab")
    await shown.keyboard.press("Tab")
    assert await rectangles.nth(1).evaluate("each => each === document.activeElement")
    assert (await shown.locator("#hint").inner_text()).startswith("4 messages")
    await shown.keyboard.press("Enter")
    assert not await rectangles.nth(0).is_visible()
    await shown.keyboard.press("Escape")
    await shown.locator("#places tbody button").nth(2).click()
    assert not await rectangles.nth(1).is_visible()
    assert await rectangles.nth(2).is_visible()


async def test_in_a_browser_the_mouse_over_a_place_shows_its_numbers(plan: Plan, shown: "Page") -> None:
    place = icicle(plan.tree()).places[2]
    assert not await shown.locator("#hint").is_visible()
    await shown.locator("#tree .place").nth(2).hover()
    name, length, calls, tokens, share = (await shown.locator("#hint").inner_text()).splitlines()
    assert (name, calls) == (place.label, f"{place.nodes[0].num_calls} calls")
    assert length == f"argument, {count(place.width)} tokens on average, {place.texts} texts"
    assert tokens.startswith(f"{count(place.tokens)} tokens, {count(place.reused_tokens)} of them reused")
    assert share == f"{100 * place.tokens / icicle(plan.tree()).tokens:.1f} % of all prompt tokens"
    await shown.locator("h1").hover()
    assert not await shown.locator("#hint").is_visible()


async def test_in_a_browser_a_heading_sorts_the_table_one_way_and_then_the_other(shown: "Page") -> None:
    async def column(number: int) -> list[str]:
        return await shown.locator(f"#places tbody td:nth-child({number})").all_text_contents()

    heading = shown.locator("#places th").nth(5)
    await heading.locator("button").click()
    tokens = [int(text.replace(",", "")) for text in await column(6)]
    assert all(one >= other for one, other in pairwise(tokens))
    assert await heading.get_attribute("aria-sort") == "descending"
    await heading.locator("button").click()
    assert [int(text.replace(",", "")) for text in await column(6)] == tokens[::-1]
    await shown.locator("#places th button").nth(1).click()
    kinds = await column(2)
    assert kinds == sorted(kinds)
    assert await shown.locator("#places th[aria-sort]").count() == 1


@pytest.mark.parametrize("width", [390, 1280])
async def test_in_a_browser_the_page_never_scrolls_sideways(shown: "Page", width: int) -> None:
    await shown.set_viewport_size({"width": width, "height": 800})
    assert await shown.evaluate("document.documentElement.scrollWidth <= innerWidth")


CONTRASTS = """
const rgba = (text) => {
  const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
  return { r, g, b, a };
};
const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const bright = ({ r, g, b }) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const ground = (each) => {
  const color = rgba(getComputedStyle(each).backgroundColor);
  return color.a ? color : ground(each.parentElement);
};
const ratio = (a, b) => (Math.max(bright(a), bright(b)) + 0.05) / (Math.min(bright(a), bright(b)) + 0.05);
const all = "body, h1 small, dt, dd, p, li, td, th button, #path *, #root, #axis span";
const texts = [...document.querySelectorAll(all)];
const kinds = [...document.querySelectorAll(".place")].map((each) =>
  [getComputedStyle(each.querySelector("text")).fill, getComputedStyle(each.querySelector(".reused")).fill]);
[...texts.map((each) => ratio(rgba(getComputedStyle(each).color), ground(each))),
 ...kinds.map(([text, kind]) => ratio(rgba(text), rgba(kind)))]
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_in_a_browser_text_is_readable_in_both_colour_schemes(shown: "Page", scheme: Any) -> None:
    await shown.emulate_media(color_scheme=scheme)
    ratios = await shown.evaluate(CONTRASTS)
    assert len(ratios) > 100
    assert min(ratios) >= 4.5
