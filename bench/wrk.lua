-- Sends the lines of a file in turn, each with a method, a path, a token and a JSON body.
local requests, n = {}, 0

function init(arguments)
  for line in io.lines(arguments[1]) do
    local method, path, token, body = line:match("(%S+) (%S+) ?(%S*) ?(.*)")
    wrk.headers["Authorization"] = token ~= "" and "Bearer " .. token or nil
    wrk.headers["Content-Type"] = body ~= "" and "application/json" or nil
    table.insert(requests, wrk.format(method, path, nil, body ~= "" and body or nil))
  end
end

function request()
  n = n + 1
  return requests[n % #requests + 1]
end

function done(summary, latency)
  local e, rate = summary.errors, summary.requests / summary.duration * 1e6
  local errors = e.connect + e.read + e.write + e.status + e.timeout
  local p50, p99 = latency:percentile(50) / 1000, latency:percentile(99) / 1000
  print("measured", summary.requests, rate, p50, p99, errors)
end
