"""The labeling screen: the photo with the network's map to edit, the heatmap beside it, one verdict.

How a class name travels: what the screen shows is its printable text, what an annotation stores is
`class_key(name)`. Label Studio's editor reads attributes as variables ($name), booleans (true) and trimmed
text, so only a key that is none of these comes back exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from urllib.parse import quote, unquote
from xml.sax.saxutils import quoteattr

Tool = Literal["bitmask", "brush"]

LABEL = "attention"
VERDICTS = {
    "map_ok": "The map is fine · 地図は正しい",
    "map_fixed": "I fixed the map · 地図を直した",
    "whole_image": "The whole picture is the evidence · 画像全体が根拠",
    "label_wrong": "The class is wrong · クラスが違う",
    "unusable": "Unusable picture · 使えない画像",
}
# Up to this many classes stay in sight; more are a drop-down list.
CLASSES_IN_SIGHT = 12

INSTRUCTIONS = """
<h3>What to do</h3>
<p>The red layer shows where the network looked. Does it cover what makes the picture what it is?</p>
<ol>
<li><b>Yes</b>: press <b>1</b> and submit (Ctrl+Enter). Nothing to paint.</li>
<li><b>No</b>: select the region <i>attention</i> in the list, paint (<b>B</b>) what matters and erase (<b>E</b>) what
does not; <b>[</b> and <b>]</b> change the size. Press <b>2</b> and submit. Do not paint more than the object:
too much harms more than too little.</li>
<li><b>The evidence is the whole picture</b>, because the class means that something is absent: press <b>3</b>.</li>
<li><b>The class is wrong</b>: press <b>4</b> and choose the right one.</li>
<li><b>Nobody could tell from this picture</b>: press <b>5</b>.</li>
</ol>
<h3>やること</h3>
<p>赤い部分は、ネットワークが見た場所です。画像の判断の根拠になる部分を覆っていますか。</p>
<ol>
<li><b>はい</b>：<b>1</b> を押して送信（Ctrl+Enter）。塗る必要はありません。</li>
<li><b>いいえ</b>：一覧で <i>attention</i> を選び、根拠の部分を塗り（<b>B</b>）、余分を消します（<b>E</b>）。
<b>[</b> と <b>]</b> で太さを変えます。<b>2</b> を押して送信。対象より広く塗らないでください。</li>
<li><b>根拠が画像全体</b>（何かが「ない」ことを表すクラス）：<b>3</b> を押します。</li>
<li><b>クラスが違う</b>：<b>4</b> を押し、正しいクラスを選びます。</li>
<li><b>この画像では判断できない</b>：<b>5</b> を押します。</li>
</ol>
""".strip()

STYLE = """
.row{display:flex;gap:10px;align-items:flex-start}
.main{flex:0 0 62%}
.side{flex:1 1 36%;min-width:280px}
.live{background:rgba(80,160,230,.15);border:1px solid rgba(80,160,230,.6);padding:4px 8px}
.lsf-auto-accept,.lsf-dynamic-preannotations{display:none}
""".strip()


def labeling_screen(classes: Sequence[str], tool: Tool = "bitmask") -> str:
    """The labeling configuration (XML) for `classes`, painted with `tool`."""
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError(f"the screen needs at least two different classes, not {list(classes)[:5]}")
    if tool not in ("bitmask", "brush"):
        raise ValueError(f"labeling.tool is {tool!r}; choose bitmask or brush")
    pen = tool.capitalize()
    layout = "inline" if len(classes) <= CLASSES_IN_SIGHT else "select"
    verdicts = "".join(
        f'<Choice value="{verdict}" html={quoteattr(text)} hotkey="{key}"/>'
        for key, (verdict, text) in enumerate(VERDICTS.items(), start=1)
    )
    names = "".join(f"<Choice value={quoteattr(_shown(name))} alias={quoteattr(class_key(name))}/>" for name in classes)
    return f"""<View><Style>{STYLE}</Style>
<HyperText name="facts" value="$facts"/>
<View className="row"><View className="main">
 <View className="live"><Text name="live_target" value="$live_title"/>
  <TextArea name="live" toName="live_target" editable="false" maxSubmissions="1" rows="1"
   showSubmitButton="false"/></View>
 <Image name="img" value="$image" smoothing="false" zoom="true" zoomControl="true" brightnessControl="true"
  width="100%" maxWidth="100%"/>
 <{pen} name="pen" toName="img"/>
 <{pen}Labels name="mask" toName="img" smartOnly="true">
  <Label value="{LABEL}" background="#ff2d55" selected="true"/>
 </{pen}Labels>
</View><View className="side">
 <Header value="Attention heatmap" size="5"/>
 <Image name="heat" value="$heatmap" zoom="false" zoomControl="false" width="100%"/>
 <Choices name="verdict" toName="img" choice="single" required="true"
  requiredMessage="Give a verdict: keys 1 to 5">{verdicts}</Choices>
 <Choices name="new_class" toName="img" choice="single" layout="{layout}" required="true"
  requiredMessage="Choose the right class" visibleWhen="choice-selected" whenTagName="verdict"
  whenChoiceValue="label_wrong">{names}</Choices>
</View></View></View>"""


def class_key(name: str) -> str:
    """What an annotation stores for the class `name`."""
    return "class:" + quote(name, safe="")


def class_name(key: str) -> str:
    """The class whose key is `key`; ValueError where it is no such key."""
    if not key.startswith("class:"):
        raise ValueError(f"{key!r} is not the key of a class")
    return unquote(key.removeprefix("class:"), errors="strict")


def _shown(name: str) -> str:
    """`name` as text that XML allows and the editor does not take for a variable."""
    return "".join(sign if sign.isprintable() else " " for sign in name).replace("$", "＄")
