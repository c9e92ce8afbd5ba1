"""How the web page looks, and the little of it that runs in the browser."""

PAGE_CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container main, .gradio-container main > .wrap { width: 100%; }
#inspector, #inspector .block, #tokens { overflow: visible !important; }
#title h1 { margin: 0 0 .1rem; font-size: 1.35rem; }
#title p { margin: 0; opacity: .7; }
.call {
  font-family: var(--font-mono); font-size: .92em; padding: .05em .4em; margin: 0 .1em; border-radius: .4em;
  background: rgba(13, 148, 136, .14); border: 1px solid rgba(13, 148, 136, .45); white-space: nowrap;
}
.refused { color: #b45309; font-style: italic; }
"""

INSPECTOR_CSS = """
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; font-size: .85rem; opacity: .85; }
.scale { display: inline-block; width: 9rem; height: .8rem; border-radius: .4rem; vertical-align: middle;
  background: linear-gradient(90deg, rgba(249,115,22,.8), rgba(250,204,21,.5), rgba(45,212,191,.5)); }
.tokens { line-height: 2.15; margin: .6rem 0 .2rem; font-size: 1.02rem; }
.token { position: relative; display: inline-block; white-space: pre; padding: 0 .18em; margin: 0 1px;
  border-radius: .3em; cursor: pointer; line-height: 1.6;
  border: 1px solid transparent; color: var(--body-text-color); }
.token:hover, .token:focus { outline: 2px solid #0d9488; z-index: 5; }
.token.control { font-family: var(--font-mono); font-size: .78em; }
.token.forced, .forced-sample { border: 1px dashed #64748b; background-image: repeating-linear-gradient(
  -45deg, transparent 0 4px, rgba(100,116,139,.28) 4px 6px); }
.forced-sample { padding: 0 .35em; border-radius: .3em; }
.token .tip { display: none; position: absolute; left: 0; top: 1.75em; width: 16rem; padding: .5rem .6rem;
  border-radius: .5rem; background: var(--background-fill-primary); color: var(--body-text-color);
  border: 1px solid var(--border-color-primary); box-shadow: 0 6px 20px rgba(0,0,0,.18);
  font-family: var(--font); font-size: .8rem; line-height: 1.45; white-space: normal; }
.token:hover .tip, .token:focus .tip { display: block; }
.token.chosen { outline: 2px solid #0d9488; }
.token.chosen .tip { display: none !important; }
.token.right .tip { left: auto; right: 0; }
.bar { display: grid; grid-template-columns: 5.4rem 1fr 3.6rem; gap: .4rem; align-items: center; }
.bar code { overflow: hidden; text-overflow: ellipsis; white-space: pre; background: none; padding: 0;
  font-size: .92em; }
.bar i { height: .55rem; border-radius: .2rem; background: rgba(13, 148, 136, .6); min-width: 1px; }
.bar.own code { font-weight: 700; }
.bar.own i { background: #ea7317; }
.bar span { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.lens { overflow-x: auto; margin-top: .6rem; }
.lens p, .tokens p { margin: .4rem 0; }
.lens table { border-collapse: separate; border-spacing: 2px; font-size: .8rem; width: auto; }
.lens th, .lens td { padding: .12rem .35rem; border: 0; white-space: pre; border-radius: .25rem; text-align: left; }
.lens th { font-weight: 600; opacity: .75; position: sticky; left: 0; background: var(--background-fill-primary); }
.lens td.hit { box-shadow: inset 0 0 0 2px #0d9488; }
.lens td.number { text-align: right; font-variant-numeric: tabular-nums; }
.lens code { background: none; padding: 0; white-space: pre; }
"""

# A click on a token, or Enter, asks for the layers behind it.
CHOOSE_TOKEN = """
const choose = (event) => {
  const token = event.target.closest('.token');
  if (!token) return;
  element.querySelectorAll('.chosen').forEach((other) => other.classList.remove('chosen'));
  token.classList.add('chosen');  // its alternatives would hide the layers that come
  trigger('click', {place: Number(token.dataset.place)});
};
element.addEventListener('click', choose);
element.addEventListener('keydown', (event) => { if (event.key === 'Enter') choose(event); });
element.addEventListener('mouseover', (event) => {
  const token = event.target.closest('.token');
  if (token) token.classList.toggle('right', token.getBoundingClientRect().left > window.innerWidth - 300);
});
"""

DOWNLOAD = """
(text) => {
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/jsonl'}));
  link.download = 'conversation.jsonl';
  link.click();
  URL.revokeObjectURL(link.href);
}
"""
