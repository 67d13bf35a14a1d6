"""The audit's report as text, Markdown and HTML."""

import html.parser
import re

import pytest

from conadv_jax.audit import report, report_html

GIB = 2**30
SPENT = {'seconds': 0.08, 'flops': 4e12, 'bytes': 30 * GIB, 'share': 0.5}
FULL = {
  'model': 'resnet50',
  'method': 'conadv',
  'topology': 'v3:16x32',
  'alias': 'v3-1024',
  'devices': 1024,
  'hosts': 128,
  'mesh': {'data': 1024, 'bn': 1},
  'batch_size': 98304,
  'examples_per_device': 96,
  'compiler_options': {},
  'fits': True,
  'peak_hbm_bytes': 7 * GIB,
  'hbm_limit_bytes': 15.5 * GIB,
  'hbm': {'parameters': GIB, 'average': 0, 'activations': 6 * GIB},
  'flops_per_device': 6.2e12,
  'flops_analytic': 6.3e12,
  'flops_ratio': 0.984,
  'bytes_accessed_per_device': 70 * GIB,
  'roofline_seconds': 0.16,
  'by_scope': {'update': SPENT, 'gradient_sum': SPENT},
  'collectives': [
    {
      'kind': 'all-reduce',
      'dtype': 'f32',
      'bytes': 98 * 2**20,
      'group_size': 1024,
      'count': 2,
    }
  ],
  'overlap': {
    'verdict': 'synchronous: position 5 of 9',
    'evidence': ['%all-reduce.1 = f32[8] all-reduce(...), op_name="a<b>_c"'],
  },
  'images_per_sec_bound': 614400.0,
  'images_per_sec_per_host': 4800.0,
  'host_cores': 96,
  'compile_seconds': 237.0,
  'versions': {'jax': '0.10.2'},
  'comparison': [
    {'name': 'baseline', 'roofline_seconds_ratio': 1.0, 'fits': True},
    {'name': 'tau 2', 'roofline_seconds_ratio': 2.711},
    {'name': 'remat', 'error': 'no such | option'},
  ],
  'sweep': [{'topology': 'v5e:16x16', 'fits': False, 'microbatches': 4}],
  'scaling': {
    'weak': [
      {
        'calibration': {'name': 'ideal'},
        'rows': [{'devices': 8, 'step_seconds': 0.2, 'efficiency': 0.93}],
      }
    ],
    'strong': [],
    'anchor': None,
    'assumptions': [
      {'name': 'stragglers', 'value': 'none', 'unit': '', 'source': 'ours'},
      {'name': 'hop', 'value': 1e-6, 'unit': 's per hop', 'source': 'a book'},
    ],
  },
}
TOO_LARGE = {
  key: FULL[key]
  for key in ('model', 'method', 'topology', 'batch_size', 'hbm_limit_bytes')
} | {
  'fits': False,
  'error': 'RESOURCE_EXHAUSTED: 16.88G of 15.75G <hbm>',
  'peak_hbm_bytes': 17 * GIB,
  'hbm': {'parameters': GIB, 'activations': 16 * GIB},
  'remedies': [
    {
      'option': 'microbatches=2',
      'saves_bytes': 8 * GIB,
      'peak_hbm_bytes': 9 * GIB,
      'fits': True,
      'cost': 'smaller kernels',
    },
    {'option': 'remat=blocks', 'saves_bytes': GIB, 'fits': False},
  ],
}
FORMS = {
  'text': report.text,
  'markdown': report.markdown,
  'html': report_html.html,
}


class Page(html.parser.HTMLParser):
  """Text and tags of a page; asserts that they nest."""

  def __init__(self, content):
    super().__init__()
    self.open, self.tags, self.words = [], [], []
    self.feed(content)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag != 'meta':
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def words(form, content):
  """As a reader sees them, without the marks of the form."""
  shown = FORMS[form](content)
  if form == 'html':
    shown = ' '.join(Page(shown).words)
  if form == 'markdown':
    shown = shown.replace('\\', '').replace('|', ' ').replace('&lt;', '<')
  return ' '.join(shown.split())


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(
  'part',
  (
    'resnet50, conadv at 98,304, on v3-1024',
    'examples per device 96',
    'mesh data=1024, bn=1',
    'compiler options none',
    'fits: 7.00 GiB of 15.50 GiB per device',
    'activations 6.00 GiB 38.7 %',
    'total 7.00 GiB 45.2 %',
    'FLOPs per device 6.2 TFLOP',
    'FLOPs ratio 0.984',
    'roofline 160 ms',
    'compile 4.0 min',
    'images per sec per host core 50',
    'gradient sum 50.0 % 80 ms 4 TFLOP 30.00 GiB',
    'all-reduce f32 98.00 MiB 1,024 2',
    'Sum of gradients: synchronous: position 5 of 9.',
    'all-reduce(...), op_name="a<b>_c"',
    'no such',
    '2.711',
    'v5e:16x16',
    'weak ideal 8 200 ms 93.0 %',
    'hop 1e-06 s per hop a book',
    'jax 0.10.2',
  ),
)
def test_every_form_shows(form, part):
  assert part in words(form, FULL)


@pytest.mark.parametrize('form', FORMS)
def test_a_step_that_does_not_fit(form):
  shown = words(form, TOO_LARGE)
  assert 'does not fit: needs 17.00 GiB of 15.50 GiB per device' in shown
  assert 'would fit with microbatches=2 (estimated)' in shown
  assert '16.88G of 15.75G <hbm>' in shown
  assert 'microbatches=2 8.00 GiB 9.00 GiB yes smaller kernels' in shown
  assert 'Collectives' not in shown and 'Sub-steps' not in shown


@pytest.mark.parametrize(
  ('remedies', 'advice'),
  (
    ([], 'use more devices'),
    (
      [{'option': 'a', 'fits': False}, {'option': 'b', 'fits': False}],
      'no one option is enough: combine a, b',
    ),
  ),
)
def test_where_no_option_is_enough(remedies, advice):
  assert report.verdict(TOO_LARGE | {'remedies': remedies}).endswith(advice)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('missing', sorted(FULL))
def test_what_is_missing_is_left_out(form, missing):
  words(form, {k: v for k, v in FULL.items() if k != missing})


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('only', sorted(FULL))
def test_a_report_of_one_thing(form, only):
  words(form, {only: FULL[only]})


def test_no_collective_is_said():
  assert 'None: nothing is exchanged.' in report.text({'collectives': []})


def test_markdown_escapes_what_would_be_markup():
  page = report.markdown({'comparison': [{'name': 'a|b <i> `c` *d* e_f'}]})
  assert r'a\|b &lt;i> \`c\` \*d\* e\_f' in page


def test_tables_of_markdown_are_rectangular():
  blocks = report.markdown(FULL).split('\n\n')
  tables = [b.strip().splitlines() for b in blocks if b.startswith('|')]
  assert len(tables) >= 8
  for rows in tables:
    assert len({row.replace(r'\|', '').count('|') for row in rows}) == 1


def test_the_page_needs_nothing_else():
  page = Page(report_html.html(FULL))
  for tag, attributes in page.tags:
    assert tag not in ('script', 'link', 'img', 'iframe')
    assert not {'src', 'href'} & attributes.keys()
  assert 'url(' not in report_html.html(FULL)
  assert '@import' not in report_html.html(FULL)


def test_the_page_escapes():
  page = Page(
    report_html.html(
      FULL
      | {
        'model': '<script>x</script>',
        'error': '<img src=y>',
        'topology': '<iframe>',
        'versions': {'<img>': '1'},
      }
    )
  )
  assert not {'script', 'img', 'iframe'} & {tag for tag, _ in page.tags}
  assert '<script>x</script>' in ''.join(page.words)


def test_bars_are_as_long_as_their_values():
  """1 GiB of parameters, 6 GiB of activations, 7 GiB of a limit of 15.5."""
  content = {key: FULL[key] for key in ('hbm', 'hbm_limit_bytes')}
  tags = Page(report_html.html(content)).tags
  bars = [attributes['style'] for tag, attributes in tags if tag == 'div']
  widths = [float(re.match(r'width: ([\d.]+)%', bar)[1]) for bar in bars]
  expected = [100 * gib / 15.5 for gib in (1, 6, 7, 15.5)]
  assert widths == pytest.approx(expected, abs=0.01)


def test_every_part_has_a_colour_of_its_own_and_a_unit_that_fits():
  """As small as a network for digits is, next to the limit of a TPU."""
  parts = {f'part {i}': 17 * 8**i for i in range(10)}
  content = {'hbm': parts, 'hbm_limit_bytes': 15.5 * GIB}
  page = Page(report_html.html(content))
  styles = [a['style'] for tag, a in page.tags if tag == 'div']
  colors = [style.partition('background: ')[2] for style in styles]
  assert len(set(colors)) == len(colors) == 12 and all(colors)
  shown = ' '.join(page.words)
  assert '17 B' in shown and '8.50 KiB' in shown and '4.25 MiB' in shown
  assert 'e-0' not in shown


@pytest.mark.parametrize(
  ('key', 'value', 'shown'),
  (
    ('flops_per_device', 6.2e12, '6.2 TFLOP'),
    ('flops_per_device', 8.11e6, '8.11 MFLOP'),
    ('step_seconds', 8.11e-9, '0.00811 µs'),
    ('step_seconds', 0, '0 ms'),
    ('peak_hbm_bytes', 3 * 2**20, '3.00 MiB'),
    ('peak_hbm_bytes', 100, '100 B'),
    ('train_seconds', 2 * 3600, '2.00 h'),
    ('step_seconds', 0.0142, '14.2 ms'),
    ('step_seconds', 1.5, '1.50 s'),
    ('fits', False, 'no'),
    ('alias', None, '-'),
    ('roofline_seconds_ratio', 2.7111, '2.711'),
    ('efficiency', 0.5, '50.0 %'),
    ('devices', 4096, '4,096'),
    ('overrides', ['a=1', 'b=2'], 'a=1, b=2'),
  ),
)
def test_values_carry_their_units(key, value, shown):
  assert report.value_text(key, value) == shown
