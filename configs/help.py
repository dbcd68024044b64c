"""The text of --help: every flag, or what one variant or one flag does."""

import inspect
import textwrap

import attention
from attention.common import options
from configs import default

USAGE = 'python main.py [--config=FILE.py or RUN/config.json] [--flag=...]'
WIDTH = 79


def asked(argv):
  """What a command line wants to know: a name, '' for all, None for nothing."""
  for i, token in enumerate(argv):
    name, equals, topic = token.partition('=')
    if name in ('-h', '--help'):
      after = argv[i + 1:i + 2]
      return topic if equals else ''.join(
          word for word in after if not word.startswith('-'))
  return None


def text(topic=''):
  """The help.

  Args:
    topic: a variant, a flag or '': everything, of attention names alone.

  Raises:
    ValueError: there is no such variant or flag.
  """
  topic = topic.lstrip('-')
  every = default.fields()
  if not topic:
    return _everything()
  if topic in attention.names():
    return _variant(topic)
  if topic in every:
    users = attention.users(topic)
    return '\n'.join([_flag(topic, every[topic])] + [
        f'  of {", ".join(users)}'] * bool(users))
  known = (*attention.names(), *every)
  raise ValueError(f'--help={topic}: no variant or flag has this name'
                   + options.nearest(topic, known))


def _everything():
  lines = [USAGE]
  for title, table in default.groups().items():
    if title != default.ATTENTION:
      lines += ['', title, *(_flag(*item) for item in table.items())]
  lines += ['', f'{default.ATTENTION}: variants and their flags; --help=NAME '
            'explains those of one, or any one flag']
  for name in attention.names():
    lines += [*_wrapped(f'{name}: {_summary(name)}', indent=2),
              *_wrapped(' '.join(attention.flags(name)), indent=6)]
  return '\n'.join(lines + ['', '--helpfull adds the flags of absl.'])


def _variant(name):
  return '\n'.join([
      f'--attention_variant={name}', '',
      inspect.getdoc(attention.get(name)).strip(), '',
      *(_flag(*item) for item in attention.flags(name).items())])


def _summary(name):
  return inspect.getdoc(attention.get(name)).partition('\n')[0]


def _flag(name, field):
  value = 'none' if field.default is None else repr(field.default)
  return '\n'.join([f'  --{name}  ({value})',
                    *_wrapped(options.text(field), indent=6)])


def _wrapped(words, *, indent):
  return textwrap.wrap(words, WIDTH, initial_indent=' ' * indent,
                       subsequent_indent=' ' * indent, break_long_words=False,
                       break_on_hyphens=False)
