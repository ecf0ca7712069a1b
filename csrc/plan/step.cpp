#include "plan/step.h"

#include <unordered_map>

namespace lamina {
namespace {

struct Entry {
  const void* function;
  StepMaker maker;
};

std::unordered_map<std::string, Entry>& entries() {
  static auto& known = *new std::unordered_map<std::string, Entry>();
  return known;
}

}  // namespace

void register_step(const std::string& name, const void* function, StepMaker maker) {
  entries()[name] = {function, maker};
}

std::unique_ptr<StepCall> make_step(const std::string& name, const std::vector<Argument>& arguments) {
  const auto found = entries().find(name);
  if (found == entries().end()) {
    throw FormatError("plan: there is no op '" + name + "' in this lamina; the plan may be from a newer one");
  }
  return found->second.maker(found->second.function, arguments);
}

}  // namespace lamina
