"""The report: one page that shows what runs found, to look at rather than to read."""
