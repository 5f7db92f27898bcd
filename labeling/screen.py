"""The labeling screen: the photo with the network's map to edit, the heatmap beside it, one verdict.

How a class name travels: what the screen shows is its printable text, what an annotation stores is
`class_key(name)`. Label Studio's editor reads attributes as variables ($name), booleans (true) and trimmed
text, so only a key that is none of these comes back exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote
from xml.sax.saxutils import quoteattr

Tool = Literal["bitmask", "brush"]

LABEL = "attention"
VERDICTS = {
    "map_ok": "The map is fine · 地図は正しい",
    "map_fixed": "I fixed the map · 地図を直した",
    "whole_image": "The whole picture is the evidence · 画像全体が根拠",
    "all_but_map": "Everything but the red is the evidence · 赤以外が根拠",
    "label_wrong": "The class is wrong · クラスが違う",
    "unusable": "Unusable picture · 使えない画像",
}
# Why a picture is asked about, by what abn/selection.py says.
REASONS = {
    "misclassified": "誤分類",
    "unsure": "判断に迷い",
    "labelers called the maps of similar pictures wrong": "似た画像の地図が誤り",
    "hangs on the picture's corners": "画像の隅に頼る",
    "learned before most others": "近道の疑い",
    "unlike every picture": "似た画像が未確認",
    "picked at random": "無作為",
}
# Up to this many classes are found at a glance; more are a list to search, because the editor would draw every button
# anew for each picture: that took ten seconds with a thousand.
CLASSES_AT_A_GLANCE = 12
UNSELECTED = "Paint first: press Alt+. or click attention · 先に attention を選んで塗ってください"
# The editor gives a key to all that has none, and takes E and B, the eraser and the brush, from them. These signs of
# Unicode's private area are keys that no keyboard has.
NO_KEY = 0xE000


def labeling_screen(classes: Sequence[str], tool: Tool = "bitmask") -> str:
    """The labeling configuration (XML) for `classes`, painted with `tool`.

    Bitmask answers a stroke at once, in a fraction of a second, and its masks are an eighth of Brush's in size. It
    darkens and roughens the photo by itself; screen.css undoes both. Brush waits 1.2 seconds before it asks.
    """
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError(f"the screen needs at least two different classes, not {list(classes)[:5]}")
    if tool not in ("bitmask", "brush"):
        raise ValueError(f"labeling.tool is {tool!r}; choose bitmask or brush")
    pen = tool.capitalize()
    style = Path(__file__).with_name("screen.css").read_text(encoding="utf-8")
    verdicts = "".join(
        f'<Choice value="{verdict}" html={quoteattr(f"<b>{key}</b> {text}")} hotkey="{key}"/>'
        for key, (verdict, text) in enumerate(VERDICTS.items(), start=1)
    )
    return f"""<View className="desk"><Style>{style}</Style>
<View className="photo {tool}">
 <View className="live"><Text name="live_target" value="$live_title"/>
  <TextArea name="live" toName="live_target" editable="false" maxSubmissions="1" rows="1" showSubmitButton="false"
   placeholder="Paint or erase, and the answer for your map appears here · 塗るか消すと、ここに答えが出ます"/></View>
 <Image name="img" value="$image" zoom="true" zoomControl="true" brightnessControl="true" width="100%"
  maxWidth="100%" maxHeight="calc(100vh - 186px)" smoothing="true"/>
 <{pen} name="pen" toName="img"/>
 <{pen}Labels name="mask" toName="img" smartOnly="true">
  <Label value="{LABEL}" background="#ff2d55" selected="true" hotkey="{chr(NO_KEY)}"/>
 </{pen}Labels>
</View><View className="side">
 <View className="facts">
  <Header value="Network · 予測" size="5"/><Header value="$network_says" size="5"/>
  <Header value="On file · 登録" size="5"/><Header value="$on_file" size="5"/>
  <Header value="What stands out · 気になる点" size="5"/><Header value="$asked_because" size="5"/>
 </View>
 <Image name="heat" value="$heatmap" zoom="false" zoomControl="false" width="100%" maxHeight="30vh"/>
 <View className="verdict"><Choices name="verdict" toName="img" choice="single-radio" required="true"
  requiredMessage="Give a verdict: keys 1 to {len(VERDICTS)}">{verdicts}</Choices></View>
 <View visibleWhen="choice-selected" whenTagName="verdict" whenChoiceValue="map_fixed">
  <View className="unselected" visibleWhen="no-region-selected"><Header value="{UNSELECTED}" size="5"/></View></View>
 <View className="classes" visibleWhen="choice-selected" whenTagName="verdict" whenChoiceValue="label_wrong">
  {_class_field(classes)}</View>
</View></View>"""


def reason_shown(reason: str) -> str:
    """What `Pick.reason` says, and in Japanese the kind of it."""
    japanese = next((text for phrase, text in REASONS.items() if phrase in reason), "")
    return f"{reason} · {japanese}" if japanese else reason


def instructions() -> str:
    """What labelers read before they begin (HTML), in English and Japanese."""
    return Path(__file__).with_name("instructions.html").read_text(encoding="utf-8")


def class_key(name: str) -> str:
    """What an annotation stores for the class `name`."""
    return "class:" + quote(name, safe="")


def class_name(key: str) -> str:
    """The class whose key is `key`; ValueError where it is no such key."""
    if not key.startswith("class:"):
        raise ValueError(f"{key!r} is not the key of a class")
    return unquote(key.removeprefix("class:"), errors="strict")


def _class_field(classes: Sequence[str]) -> str:
    """Where the right class is chosen: by a key, or from a list that is searched."""
    field = 'name="new_class" toName="img" required="true" requiredMessage="Choose the right class"'
    named = [f"value={quoteattr(_shown(name))} alias={quoteattr(class_key(name))}" for name in classes]
    if len(classes) > CLASSES_AT_A_GLANCE:
        names = "".join(f"<Choice {name}/>" for name in named)
        return f'<Taxonomy {field} maxUsages="1" minWidth="300px" placeholder="Find · 検索">{names}</Taxonomy>'
    names = "".join(f'<Choice {name} hotkey="{_hotkey(number)}"/>' for number, name in enumerate(named, start=1))
    return f'<Choices {field} choice="single-radio" layout="inline">{names}</Choices>'


def _hotkey(number: int) -> str:
    return f"alt+{number}" if number < 10 else chr(NO_KEY + number)


def _shown(name: str) -> str:
    """`name` as text that XML allows and the editor does not take for a variable."""
    return "".join(sign if sign.isprintable() else " " for sign in name).replace("$", "＄")
