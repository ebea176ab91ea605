"""What tests read of a report's page."""

import json
import re
from html.parser import HTMLParser


def parsed(html):
    """The tags of a page with their attributes, and its data."""

    class Parser(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags = []

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, dict(attributes)))

    parser = Parser()
    parser.feed(html)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return parser.tags, json.loads(data[1])


def traces_of(figure):
    """All of a figure that plotly reads; choices are text of the page."""
    return [{key: value for key, value in trace.items() if key != "meta"} for trace in figure["traces"]]
